//! The leases of all nodes, as clients of this one see them.

use ipnet::IpNet;
use muslin_stack::api::control::{DropLease, Dropped, Lease};
use muslin_stack::api::events::EventKind;

use super::liveness::Census;
use super::running::RunningNode;
use crate::error::Result;
use crate::lease::release::release;
use crate::lease::table::{self, Known};

impl RunningNode {
    /// What the store has at this moment.
    pub(super) async fn leases(&self) -> Result<Vec<Lease>> {
        let store = self.leases.as_ref();
        let survey = table::survey(store, &self.facts.settings.prefix);
        let (entries, census) = tokio::try_join!(survey, Census::take(self))?;
        let known = |subnet| census.known(&self.naming.names.read(), subnet);
        Ok(table::rows(&entries, self.viewer(&known)))
    }

    fn viewer<'a>(&'a self, known: &'a (dyn Fn(IpNet) -> Known + Sync)) -> table::Viewer<'a> {
        let facts = &self.facts;
        table::Viewer {
            prefix: &facts.settings.prefix,
            config: &facts.config,
            node: &facts.settings.name,
            own: facts.subnets.into(),
            public: self.interface().public(),
            here: self.control.lock().here(),
            known,
        }
    }

    /// Gives back the lease of a node that is dead.
    pub(super) async fn drop_lease(&self, request: DropLease) -> Result<Dropped> {
        let census = Census::take(self).await?;
        let known = |subnet| census.known(&self.naming.names.read(), subnet);
        let dropped = release(self.leases.as_ref(), self.viewer(&known), &request).await?;
        let (subnet, state) = (&dropped.subnet, &dropped.state);
        let text = format!("the lease {subnet} of a node that is {state} is given back");
        self.journal.note(EventKind::LeaseDropped, subnet, text);
        Ok(dropped)
    }
}
