# The two commands of the README, and what CI runs. Each installs what it needs where it may
# (see .ci/need), and prints the line to run where it may not.

.PHONY: demo test soak attack fuzz nightly lint features deny doc msrv publish-check portability image man clean

# The main job: two nodes and four pods on this machine, rootless, on the embedded store.
demo:
	@.ci/need build
	cargo build --release --locked
	@.ci/need tun
	target/release/muslin demo

# The tests: unit, property and documentation tests, and end-to-end labs in user namespaces. What
# was skipped for lack of a tool is listed at the end; what a test leaves behind is a failure.
test:
	@.ci/need build lab
	@.ci/need tun
	.ci/test

# Transfers between the pods of two nodes, each compared, for MINUTES while nodes are killed, stopped
# and started again; SEED makes other faults.
soak: MINUTES = 10
soak:
	@.ci/need build lab
	@.ci/need tun
	MUSLIN_SOAK_MINUTES=$(MINUTES) MUSLIN_SOAK_SEED=$(SEED) cargo test --locked --release --test soak \
		-- --ignored --nocapture contents_are_whole

# What is tried on a node and takes minutes: a hundred kills at any time, and all floods of one pod
# beside what others see.
attack:
	@.ci/need build lab
	@.ci/need tun
	cargo test --locked --release --test soak -- --ignored --nocapture a_node_that_is_killed
	cargo bench --locked --bench fairness -- --quick

# Every fuzz target for SECONDS seconds, where there are cargo-fuzz and nightly. Without them `test`
# has tried mutations of the seeds.
SECONDS ?= 5
fuzz:
	@.ci/need build
	fuzz/run $(SECONDS)

# What is too long for `test`, for MINUTES in all, with a SEED of its own unless one is given: random
# seeds, 20,000 cases of each property, broken lines and boundaries that tests must notice.
MINUTES ?= 240
nightly:
	@.ci/need build lab
	@.ci/nightly $(MINUTES) $(SEED)

lint:
	@.ci/need build
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --manifest-path fuzz/Cargo.toml --all-targets --locked -- -D warnings

# The program with some of its Cargo features only, each of which can be left out, without a warning.
features:
	@.ci/need build
	.ci/features

# Licences, sources and duplicates of all dependencies, and what is known against them where the advisory
# database can be had (deny.toml).
deny:
	@command -v cargo-deny >/dev/null || \
		{ echo "muslin: cargo-deny is missing: run 'cargo install cargo-deny --locked'" >&2; exit 1; }
	cargo deny --workspace --locked check licenses bans sources
	@if cargo deny --locked fetch db 2>/dev/null; then \
		cargo deny --workspace --locked check advisories; \
	else \
		echo "muslin: the advisory database cannot be had here: nothing is said about advisories" >&2; \
	fi

# The pure crates build where there is no Linux: nothing in them touches an operating system.
portability:
	rustup target add aarch64-apple-darwin
	cargo check --locked -p muslin-stack -p muslin-encap --target aarch64-apple-darwin

# The documentation, without a warning: a link that leads nowhere is an error.
doc:
	@.ci/need build
	RUSTDOCFLAGS="-D warnings -D rustdoc::broken_intra_doc_links" \
		cargo doc --workspace --no-deps --locked

# The oldest Rusts that Cargo.toml names still compile the libraries, and the program.
msrv: oldest = $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
msrv:
	@.ci/need build
	rustup toolchain install $(oldest) --profile minimal
	cargo +$(word 1,$(oldest)) check --locked -p muslin-encap -p muslin-stack
	cargo +$(word 2,$(oldest)) check --locked -p muslin

# What would be published. muslin-encap is packed and built as a registry has it. Of the two others the list
# of files can be checked only: packing them asks the registry for the crates below them, which are not
# published yet.
publish-check:
	@.ci/need build
	cargo publish --dry-run --locked --allow-dirty -p muslin-encap
	cargo package --list --locked --allow-dirty -p muslin-stack >/dev/null
	cargo package --list --locked --allow-dirty -p muslin >/dev/null

# A container image of the static binary (deploy/README.md), with what a sidecar needs; FEATURES=default is
# all of it. The program writes its manual itself, so there is none where this machine cannot run it.
TARGET ?= x86_64-unknown-linux-musl
FEATURES ?= etcd,sidecar
IMAGE ?= localhost/muslin:latest
# musl-gcc does not look where Debian has those of the kernel.
KERNEL_HEADERS = -idirafter /usr/include -idirafter /usr/include/$(shell cc -print-multiarch)
image:
	@.ci/need build image
	rustup target add $(TARGET)
	CFLAGS_$(subst -,_,$(TARGET))="$(KERNEL_HEADERS)" cargo build --release --locked \
		--no-default-features --features $(FEATURES) --target $(TARGET)
	rm -rf target/image
	install -D --target-directory target/image \
		$(addprefix target/$(TARGET)/release/, muslin muslin-cni muslin-netavark)
	mkdir -p target/image/share/man/man1 target/image/share/completions
	target/image/muslin man target/image/share/man/man1 && \
		for shell in bash zsh fish; do \
			target/image/muslin completions $$shell >target/image/share/completions/muslin.$$shell; \
		done || echo "muslin: the image has no manual: this machine cannot run its program" >&2
	podman build --file deploy/Containerfile --tag $(IMAGE) target/image

# The manual, a page for each command, and what shells complete: target/man and target/completions.
man:
	@.ci/need build
	cargo build --release --locked
	target/release/muslin man target/man
	mkdir -p target/completions
	for shell in bash zsh fish; do \
		target/release/muslin completions $$shell >target/completions/muslin.$$shell || exit 1; \
	done

clean:
	cargo clean
