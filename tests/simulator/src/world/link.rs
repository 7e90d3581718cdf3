//! Posts on their way between the two machines.

use super::{World, name};
use crate::say;
use crate::wire::Payload;

impl World {
    /// A post lands in the peer's memory.
    pub(super) fn land(&mut self, node: usize) {
        if self.linked && self.machines[1 - node].up {
            let count = 1 + self.dice.below(4);
            for _ in 0..count {
                self.land_one(node, None);
            }
        }
    }

    /// Lands the first post that has not; only its first lines if it is torn.
    pub fn land_one(&mut self, node: usize, torn: Option<usize>) -> bool {
        let [a, b] = &mut self.machines;
        let (owner, mirror) = if node == 0 { (a, b) } else { (b, a) };
        let Some(wire) = owner.wire.as_mut().filter(|wire| !wire.broken) else {
            return false;
        };
        let Some(post) = wire.flying.iter_mut().find(|post| !post.landed) else {
            return false;
        };
        let exposed = mirror.agent.as_ref().and_then(|agent| agent.exposed);
        if exposed != Some(wire.registration) {
            wire.broken = true;
            return false;
        }
        let sealed = mirror.agent.as_ref().is_some_and(|agent| agent.sealed);
        let mut bytes = post.head.to_vec();
        match &post.body {
            Payload::Bytes(own) => bytes.extend_from_slice(own),
            Payload::Ring { at, len } => {
                if let Some(kernel) = &owner.kernel {
                    bytes.extend_from_slice(kernel.ring.bytes(twinwrite::ids::RingPos(*at), *len));
                }
            }
        }
        let end = torn.map_or(bytes.len(), |lines| (lines * 64).min(bytes.len()));
        if torn.is_none() {
            post.landed = true;
        }
        let (id, offset) = (post.id, post.offset);
        if let Some(region) = &mut mirror.region {
            region.store(offset, &bytes[..end]);
        }
        say!(
            self,
            "post {} of {} lands at {offset} ({end} bytes)",
            id.0,
            name(node)
        );
        if sealed {
            self.violate(
                "5, one writer",
                format!("post {} landed in a revoked region", id.0),
            );
        }
        true
    }

    /// Completions come back.
    pub(super) fn complete(&mut self, node: usize) {
        if !self.linked {
            return;
        }
        let count = 1 + self.dice.below(4);
        if let Some(wire) = &mut self.machines[node].wire {
            for _ in 0..count {
                if wire.flying.front().is_some_and(|post| post.landed)
                    && let Some(post) = wire.flying.pop_front()
                {
                    wire.completions.push_back(post.id);
                }
            }
        }
    }

    pub(super) fn cut_link(&mut self) {
        if !std::mem::replace(&mut self.linked, false) {
            return;
        }
        say!(self, "the interconnect is cut");
    }

    pub(super) fn mend_link(&mut self) {
        if self.linked {
            return;
        }
        // What was not repeated for so long is given up.
        for node in 0..2 {
            if self.dice.chance(60) {
                self.break_wire(node);
            }
        }
        self.linked = true;
        say!(self, "the interconnect works again");
    }

    /// A link ends: some posts arrive still, one in part, completions are lost.
    pub fn break_wire(&mut self, node: usize) {
        if self.machines[node]
            .wire
            .as_ref()
            .is_none_or(|wire| wire.broken)
        {
            return;
        }
        let arrive = self.dice.below(3);
        if self.linked && self.machines[1 - node].up {
            for _ in 0..arrive {
                self.land_one(node, None);
            }
            let lines = self.dice.below(5);
            self.land_one(node, Some(lines));
        }
        if let Some(wire) = &mut self.machines[node].wire {
            wire.broken = true;
            wire.flying.clear();
        }
        say!(self, "the link of {} to the region breaks", name(node));
    }
}
