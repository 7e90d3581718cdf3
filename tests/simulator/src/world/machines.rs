//! Machines and agents that die and come back, and the volume as they mount it.

use super::{Agent, World, name};
use crate::history::History;
use crate::keeper::Keeping;
use crate::kernel::Kernel;
use crate::say;
use crate::wire::Payload;

impl World {
    /// An agent dies, and with it its links and registrations.
    pub fn kill_agent(&mut self, node: usize) {
        if self.machines[node].agent.is_none() {
            return;
        }
        self.break_wire(node);
        self.machines[node].wire = None;
        self.machines[node].agent = None;
        say!(self, "{}: the agent dies", name(node));
    }

    /// A machine loses its power.
    pub fn crash(&mut self, node: usize, why: &str) {
        if !self.machines[node].up {
            return;
        }
        self.counts.crashes += 1;
        self.check_mirrored(node);
        if let Some(agent) = &self.machines[node].agent {
            agent.ledger.tear(&mut self.mailbox, &mut self.dice);
        }
        // What is in the network may still arrive, much later.
        let ghost = self.dice.chance(40);
        let machine = &mut self.machines[node];
        if let (Some(wire), Some(kernel)) = (&mut machine.wire, &machine.kernel) {
            for post in &mut wire.flying {
                if let Payload::Ring { at, len } = post.body {
                    let bytes = kernel.ring.bytes(twinwrite::ids::RingPos(at), len);
                    post.body = Payload::Bytes(bytes.to_vec());
                }
            }
        }
        if !ghost {
            self.break_wire(node);
            self.machines[node].wire = None;
        }
        let takes_over =
            |agent: &Agent| matches!(agent.keeping, Keeping::TakingOver(_) | Keeping::Deciding);
        let machine = &self.machines[node];
        let unserved = machine.kernel.as_ref().is_some_and(|kernel| !kernel.served);
        if unserved && machine.saved.is_some() && machine.agent.as_ref().is_none_or(takes_over) {
            self.half_merged = true;
        }
        let machine = &mut self.machines[node];
        machine.agent = None;
        machine.up = false;
        machine.paused = false;
        machine.region = None;
        machine.page = None;
        if let Some(kernel) = machine.kernel.take() {
            self.generation = self.generation.max(kernel.last_generation());
            self.at_rest = self.disk.power_cut(&mut self.dice);
        }
        say!(self, "{}: {why}", name(node));
    }

    pub(super) fn boot(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        if machine.up {
            return;
        }
        machine.up = true;
        machine.boot += 1;
        machine.wire = None;
        say!(self, "{}: boots", name(node));
        self.start_agent(node);
    }

    pub(super) fn pause(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        if machine.up {
            machine.paused = !machine.paused;
            let paused = machine.paused;
            say!(
                self,
                "{}: {}",
                name(node),
                if paused { "stops, whole" } else { "goes on" }
            );
        }
    }

    /// The owner's device is used by one kernel at a time.
    pub(super) fn look_for_two_writers(&mut self) {
        if self.machines.iter().all(|machine| machine.kernel.is_some()) {
            self.violate(
                "5, one writer",
                "both machines have the volume mounted".to_owned(),
            );
        }
    }

    /// The peer's memory must hold at least what its owner calls mirrored.
    pub fn check_mirrored(&mut self, node: usize) {
        let Some(owner) = self.machines[node]
            .agent
            .as_ref()
            .and_then(|a| a.keeping.owner())
        else {
            return;
        };
        let Some((epoch, mirrored)) = owner.mirrored() else {
            return;
        };
        let Some(region) = &self.machines[1 - node].region else {
            return;
        };
        if region.header().is_none_or(|h| h.epoch != epoch.0) {
            return;
        }
        match region.scan() {
            Ok(scan) if scan.tail().last_complete_seq() >= mirrored => {}
            Ok(scan) => {
                let found = scan.tail().last_complete_seq();
                self.violate(
                    "2, whole up to the cut",
                    format!(
                        "{} calls record {mirrored} mirrored, the region ends with {found}",
                        name(node)
                    ),
                );
            }
            Err(error) => {
                self.violate(
                    "2, whole up to the cut",
                    format!("the region cannot be read: {error}"),
                );
            }
        }
    }

    /// Mounts the volume on a node.
    pub fn mount(&mut self, node: usize) {
        let image = self.at_rest.clone();
        self.disk.mounted(image.clone());
        self.machines[node].kernel = Some(Kernel::mount(
            image,
            self.setting.ring_bytes,
            self.generation,
        ));
        say!(self, "{}: mounts the volume", name(node));
        self.look_for_two_writers();
    }

    /// Unmounts it in order: everything reaches the disk.
    pub fn unmount(&mut self, node: usize) {
        if let Some(mut kernel) = self.machines[node].kernel.take() {
            kernel.sync_all(&mut self.disk);
            self.generation = self.generation.max(kernel.last_generation());
            let mut image = kernel.live;
            image.inodes.retain(|_, inode| inode.links > 0);
            self.disk.mounted(image.clone());
            self.at_rest = image;
            // Whoever mounts it next shows all of it; nobody was told that it is durable, though.
            self.promised = None;
            say!(self, "{}: unmounts the volume", name(node));
        }
    }

    /// The volume goes on as it is shown on this node: its oracle begins anew.
    pub fn adopt(&mut self, node: usize) {
        if let Some(kernel) = &self.machines[node].kernel {
            self.history = History::new(kernel.live.clone());
        }
        self.promised = None;
        self.half_merged = false;
    }
}
