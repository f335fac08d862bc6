//! A client of the container runtime interface, by which kubelet speaks to a runtime.
//!
//! The messages are those of `runtime.v1` (kubernetes/cri-api, api.proto) with the fields that tests
//! need; what else a runtime tells is skipped.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use prost::Message;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::watch::{stretched, waits_for};

/// kubelet waits 4 minutes for a sandbox, which is longer than a test may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A pod as kubelet describes it to a runtime: `PodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct Pod {
    /// Its names.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<Metadata>,
    /// Its name for itself.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where containers' output goes; nowhere if it is empty.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// For its `/etc/resolv.conf`, and for plugins with the capability `dns`.
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    /// For plugins with the capability `portMappings`.
    #[prost(message, repeated, tag = "5")]
    pub ports: Vec<Port>,
    /// Plugins do not see them.
    #[prost(btree_map = "string, string", tag = "6")]
    pub labels: BTreeMap<String, String>,
    /// For plugins with the capability `io.kubernetes.cri.pod-annotations`; those of `bandwidth` are
    /// here, too.
    #[prost(btree_map = "string, string", tag = "7")]
    pub annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

impl Pod {
    /// A pod of the namespace `default`, of which there has been none before.
    pub fn new(name: &str) -> Self {
        let metadata = Metadata {
            name: name.to_owned(),
            uid: format!("uid-of-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        };
        Self {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            linux: Some(LinuxPod::default()),
            ..Self::default()
        }
    }

    /// The same pod in a sandbox after so many others.
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.metadata.get_or_insert_default().attempt = attempt;
        self
    }

    /// With a port of the host.
    pub fn publishes(mut self, protocol: Protocol, host: u16, container: u16) -> Self {
        self.ports.push(Port {
            protocol: protocol.into(),
            container: container.into(),
            host: host.into(),
            host_ip: String::new(),
        });
        self
    }

    /// With an annotation.
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }
}

/// `PodSandboxMetadata`.
#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    /// Of the pod.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Of the pod, too.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// The pod's, in Kubernetes.
    #[prost(string, tag = "3")]
    pub namespace: String,
    /// How many sandboxes the pod has had before.
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

/// `DNSConfig`.
#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    /// Addresses.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// Domains.
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
    /// As resolv.conf(5) has them.
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// `PortMapping`.
#[derive(Clone, PartialEq, Message)]
pub struct Port {
    /// What it carries.
    #[prost(enumeration = "Protocol", tag = "1")]
    pub protocol: i32,
    /// The pod's.
    #[prost(int32, tag = "2")]
    pub container: i32,
    /// The host's, or 0.
    #[prost(int32, tag = "3")]
    pub host: i32,
    /// The host's address, or all if it is empty.
    #[prost(string, tag = "4")]
    pub host_ip: String,
}

/// Of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
#[allow(missing_docs, reason = "they are well-known")]
pub enum Protocol {
    Tcp = 0,
    Udp = 1,
    Sctp = 2,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPod {}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<Pod>,
}

/// A request or an answer with nothing but a name: of a sandbox or of a container.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct VerboseId {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
    #[prost(btree_map = "string, string", tag = "2")]
    info: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatus {
    /// 0 is ready, 1 is not.
    #[prost(int32, tag = "3")]
    state: i32,
    #[prost(message, optional, tag = "5")]
    network: Option<SandboxNetwork>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxNetwork {
    #[prost(string, tag = "1")]
    ip: String,
    /// Those behind the first.
    #[prost(message, repeated, tag = "2")]
    additional: Vec<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxList {
    #[prost(message, repeated, tag = "1")]
    items: Vec<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    sandbox: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod: Option<Pod>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    name: Option<Id>,
    #[prost(message, optional, tag = "2")]
    image: Option<Id>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "2")]
    security: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    /// 1 is one for each container, as kubelet has it.
    #[prost(int32, tag = "2")]
    pid: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSync {
    #[prost(string, tag = "1")]
    container: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    /// In seconds.
    #[prost(int64, tag = "3")]
    timeout: i64,
}

/// What a command in a container has said: `ExecSyncResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct Output {
    /// To its standard output.
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    /// To its standard error.
    #[prost(bytes = "vec", tag = "2")]
    pub stderr: Vec<u8>,
    /// Its exit code.
    #[prost(int32, tag = "3")]
    pub code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ImageStatus {
    #[prost(message, optional, tag = "1")]
    image: Option<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageAnswer {
    #[prost(message, optional, tag = "1")]
    image: Option<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<Condition>,
}

/// `RuntimeCondition`, such as `NetworkReady`.
#[derive(Clone, PartialEq, Message)]
pub struct Condition {
    /// Its name.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// Whether it is met.
    #[prost(bool, tag = "2")]
    pub is_met: bool,
    /// A word.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// For an operator.
    #[prost(string, tag = "4")]
    pub message: String,
}

/// A sandbox as the runtime sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Whether it runs.
    pub is_ready: bool,
    /// Those of `eth0`, in the plugin's order.
    pub addresses: Vec<IpAddr>,
    /// The network namespace, as the plugin gets it in `CNI_NETNS`; empty once it is closed.
    pub netns: String,
}

/// A client of one runtime.
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

impl Cri {
    /// A client of the runtime that has, or will have, its socket here.
    pub(crate) fn new(socket: &Path) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
        let channel = {
            let _inside = runtime.enter();
            endpoint.unwrap().connect_lazy()
        };
        Self { runtime, channel }
    }

    /// Starts a pod's sandbox and returns its name, which plugins get as `CNI_CONTAINERID`.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn run(&self, pod: &Pod) -> Result<String, String> {
        self.run_all(std::slice::from_ref(pod)).remove(0)
    }

    /// Starts all sandboxes at once.
    pub fn run_all(&self, pods: &[Pod]) -> Vec<Result<String, String>> {
        let requests = pods.iter().map(|pod| RunPodSandbox {
            config: Some(pod.clone()),
        });
        let answers = self.all::<_, Id>("RunPodSandbox", requests);
        let ids = answers.into_iter().map(|answer| Ok(answer?.id));
        ids.collect()
    }

    /// Stops a sandbox: its processes end and its network is taken down.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn stop(&self, sandbox: &str) -> Result<(), String> {
        self.stop_all(&[sandbox]).remove(0)
    }

    /// Stops all sandboxes at once.
    pub fn stop_all(&self, sandboxes: &[impl AsRef<str>]) -> Vec<Result<(), String>> {
        let requests = sandboxes.iter().map(|sandbox| id(sandbox.as_ref()));
        let answers = self.all::<_, Nothing>("StopPodSandbox", requests);
        answers.into_iter().map(|answer| answer.map(drop)).collect()
    }

    /// Removes a sandbox, and stops it before.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn remove(&self, sandbox: &str) -> Result<(), String> {
        self.ask::<_, Nothing>("RemovePodSandbox", id(sandbox))
            .map(drop)
    }

    /// How a sandbox is.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn sandbox(&self, sandbox: &str) -> Result<Sandbox, String> {
        let request = VerboseId {
            id: sandbox.to_owned(),
            verbose: true,
        };
        let answer: SandboxStatusAnswer = self.ask("PodSandboxStatus", request)?;
        let status = answer.status.unwrap_or_default();
        let network = status.network.unwrap_or_default();
        let more = network.additional.iter().map(|more| &more.id);
        let addresses = std::iter::once(&network.ip).chain(more);
        let info = answer.info.get("info").map_or("{}", String::as_str);
        Ok(Sandbox {
            is_ready: status.state == 0,
            addresses: addresses.filter_map(|ip| ip.parse().ok()).collect(),
            netns: netns(&serde_json::from_str(info).unwrap()),
        })
    }

    /// The names of all sandboxes, also of those that are stopped.
    pub fn sandboxes(&self) -> Vec<String> {
        let answer: SandboxList = self.ask("ListPodSandbox", Nothing {}).unwrap();
        answer.items.into_iter().map(|item| item.id).collect()
    }

    /// Starts a container in a pod's sandbox and returns its name.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn start(
        &self,
        (sandbox, pod): (&str, &Pod),
        image: &str,
        command: &[&str],
    ) -> Result<String, String> {
        let config = ContainerConfig {
            name: Some(id("only")),
            image: Some(id(image)),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            linux: Some(LinuxContainer {
                security: Some(ContainerSecurity {
                    namespaces: Some(Namespaces { pid: 1 }),
                }),
            }),
        };
        let request = CreateContainer {
            sandbox: sandbox.to_owned(),
            config: Some(config),
            pod: Some(pod.clone()),
        };
        let container: Id = self.ask("CreateContainer", request)?;
        let _: Nothing = self.ask("StartContainer", container.clone())?;
        Ok(container.id)
    }

    /// Runs a command in a container to its end.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<Output, String> {
        let request = ExecSync {
            container: container.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: PATIENCE.as_secs().try_into().unwrap(),
        };
        self.ask("ExecSync", request)
    }

    /// The runtime's conditions, as kubelet asks for them every 5 seconds.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn status(&self) -> Result<Vec<Condition>, String> {
        let answer: StatusAnswer = self.ask("Status", Nothing {})?;
        Ok(answer.status.unwrap_or_default().conditions)
    }

    /// The condition `NetworkReady`.
    ///
    /// # Errors
    /// What the runtime says.
    pub fn network(&self) -> Result<Condition, String> {
        let mut conditions = self.status()?.into_iter();
        let network = conditions.find(|condition| condition.kind == "NetworkReady");
        network.ok_or_else(|| "there is no condition of the network".to_owned())
    }

    /// Whether the runtime has an image.
    pub(crate) fn has_image(&self, image: &str) -> bool {
        let request = ImageStatus {
            image: Some(id(image)),
        };
        let service = "runtime.v1.ImageService";
        let answers = self.all_of::<_, ImageAnswer>(service, "ImageStatus", [request]);
        matches!(answers.first(), Some(Ok(answer)) if answer.image.is_some())
    }

    fn ask<Q, A>(&self, method: &'static str, request: Q) -> Result<A, String>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        self.all(method, [request]).remove(0)
    }

    fn all<Q, A>(
        &self,
        method: &'static str,
        requests: impl IntoIterator<Item = Q>,
    ) -> Vec<Result<A, String>>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        waits_for(format!("the answer of the runtime to {method}"));
        self.all_of("runtime.v1.RuntimeService", method, requests)
    }

    fn all_of<Q, A>(
        &self,
        service: &'static str,
        method: &'static str,
        requests: impl IntoIterator<Item = Q>,
    ) -> Vec<Result<A, String>>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = format!("/{service}/{method}");
        let patience = stretched(PATIENCE);
        self.runtime.block_on(async {
            let tasks = requests.into_iter().map(|request| {
                let channel = self.channel.clone();
                let path: PathAndQuery = path.parse().unwrap();
                tokio::spawn(call(channel, path, request, patience))
            });
            let mut answers = Vec::new();
            for task in tasks.collect::<Vec<_>>() {
                answers.push(task.await.unwrap());
            }
            answers
        })
    }
}

async fn call<Q, A>(
    channel: Channel,
    path: PathAndQuery,
    request: Q,
    patience: Duration,
) -> Result<A, String>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| error.to_string())?;
    let mut request = Request::new(request);
    request.set_timeout(patience);
    let answer = client.unary(request, path, ProstCodec::default());
    match answer.await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(status.message().to_owned()),
    }
}

fn id(id: &str) -> Id {
    Id { id: id.to_owned() }
}

/// Where a sandbox' network namespace is, by what containerd knows beyond the standard.
fn netns(info: &Value) -> String {
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
    let mut namespaces = namespaces.into_iter().flatten();
    let network = namespaces.find(|namespace| namespace["type"] == "network");
    let path = network.and_then(|network| network["path"].as_str());
    path.unwrap_or_default().to_owned()
}
