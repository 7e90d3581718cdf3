//! Building posts, and what their completions mean.

use zerocopy::IntoBytes;

use super::fill::OpenFill;
use super::space::{HeadPoint, Place};
use super::{Action, Advance, CoreError, MirrorCore};
use crate::faults::{Fault, injected};
use crate::ids::{Lsn, RingPos, Seq};
use crate::link::PostId;
use crate::region::layout::{
    FILL_GONE, FILL_LAST, FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameHeader,
    HEAD_MAGIC, HEAD_OFFSETS, HeadSlot, LOG_OFFSET, MIRRORED_MAGIC, MIRRORED_OFFSET, Mirrored,
    REGION_VERSION, Sealed, kind,
};
use crate::region::scan::PendingFill;

/// What is mirrored is published no later than this.
pub const PUBLISH_EVERY_US: u64 = 20_000;
/// Nor after more bytes than these, or an eighth of a small log.
pub const PUBLISH_BYTES: u64 = 1 << 20;
/// The head moves no more often than this while the log has room.
const HEAD_EVERY_US: u64 = 100_000;

/// The bytes behind a post's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PostBody {
    /// None.
    None,
    /// A stretch of the ring; it stays unchanged until [`Action::ReleaseRing`] has passed it.
    Ring {
        /// Where it begins.
        pos: RingPos,
        /// Bytes.
        len: u32,
    },
    /// Bytes of their own.
    Bytes(Vec<u8>),
}

/// What a post writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostKind {
    /// A frame that carries records.
    Run,
    /// A frame that carries the bytes of a record.
    Fill,
    /// A frame that carries a checkpoint mark.
    Mark,
    /// A frame that fills the end of the log.
    Pad,
    /// The `mirrored` line of the status page.
    Mirrored,
    /// A head slot of the status page.
    Head,
}

/// A post without a completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    id: u64,
    effect: Effect,
}

/// What its completion means.
#[derive(Clone, Copy, Debug)]
enum Effect {
    /// The log is in the region up to `lsn`, complete up to `seq`.
    Frame {
        lsn: Lsn,
        seq: Seq,
        release: RingPos,
    },
    /// The `mirrored` line is there.
    Mirrored,
    /// The head is there.
    Head { lsn: Lsn },
}

/// What is particular to a frame.
struct Frame {
    kind: u8,
    flags: u16,
    first_seq: Seq,
    ring_pos: u64,
    count: u32,
    body_len: u32,
    fill_offset: u32,
    body_crc32c: u32,
}

impl MirrorCore {
    /// The next thing to do, `None` if nothing can be done now. `ring_crc32c` computes the CRC-32C of a
    /// stretch of the ring.
    pub fn next_action(&mut self, ring_crc32c: impl FnOnce(RingPos, u32) -> u32) -> Option<Action> {
        if self.release > self.released {
            self.released = self.release;
            return Some(Action::ReleaseRing(self.release));
        }
        if !self.half_told && self.space.taken(self.end.lsn) * 2 >= self.space.log_bytes {
            self.half_told = true;
            return Some(Action::RegionHalf);
        }
        if let Some(ask) = self.ask_for_fill() {
            return Some(ask);
        }
        if self.in_flight.len() >= self.window {
            return None;
        }
        self.post_mirrored()
            .or_else(|| self.post_head())
            .or_else(|| self.post_frame(ring_crc32c))
    }

    /// Notes that a post has completed; the link completes posts in order.
    ///
    /// # Errors
    /// [`CoreError::Completion`] if another one was due.
    pub fn completed(&mut self, id: PostId, now_us: u64) -> Result<Option<Advance>, CoreError> {
        self.now_us = self.now_us.max(now_us);
        let due = self.in_flight.front().copied();
        let Some(post) = due.filter(|post| post.id == id.0) else {
            return Err(CoreError::Completion {
                found: id.0,
                expected: due.map(|post| post.id),
            });
        };
        self.in_flight.pop_front();
        match post.effect {
            Effect::Mirrored => {
                self.publishing = false;
                Ok(None)
            }
            Effect::Head { lsn } => {
                self.space.head_completed(lsn);
                (self.half_told, self.full, self.full_told) = (false, false, false);
                Ok(None)
            }
            Effect::Frame { lsn, seq, release } => {
                self.mirrored_lsn = lsn;
                self.space.complete_next();
                self.space
                    .purge(self.purged, &self.end, self.fill.is_some());
                Ok(self.advance(seq, release))
            }
        }
    }

    fn post(
        &mut self,
        offset: u64,
        head: &[u8],
        body: PostBody,
        kind: PostKind,
        effect: Effect,
    ) -> Action {
        let id = self.next_id;
        self.next_id += 1;
        self.in_flight.push_back(InFlight { id, effect });
        let mut line = [0; 64];
        line.iter_mut().zip(head).for_each(|(to, from)| *to = *from);
        Action::Post {
            id: PostId(id),
            offset,
            head: line,
            body,
            kind,
        }
    }

    fn is_behind(&self, now: (Lsn, Seq)) -> bool {
        self.published != Some(now) && now.0 != Lsn(0)
    }

    /// Each line costs a post, so it waits for more to tell: not for long, not while many bytes could be
    /// damaged without anybody's notice, and never while the head waits for it.
    fn is_publishing_due(&self, now: Lsn) -> bool {
        let Some((published, _)) = self.published else {
            return true;
        };
        now.0.saturating_sub(published.0) >= PUBLISH_BYTES.min(self.space.log_bytes / 8)
            || self.now_us - self.published_us >= PUBLISH_EVERY_US
            || self.head_due().is_some_and(|head| head.lsn > published)
    }

    /// When the time has come to publish what is not published yet, on the clock of
    /// [`MirrorCore::tick`]: the driver is to ask for the next action then.
    #[must_use]
    pub fn publish_at_us(&self) -> Option<u64> {
        let behind = !self.publishing && self.is_behind((self.mirrored_lsn, self.mirrored));
        behind.then_some(self.published_us + PUBLISH_EVERY_US)
    }

    /// The head that is to be written now. It frees space, of which there is plenty at first.
    fn head_due(&self) -> Option<HeadPoint> {
        let head = self.space.head_due()?;
        let wanted = self.space.taken(self.end.lsn) >= self.space.log_bytes / 8
            || self.now_us - self.head_us >= HEAD_EVERY_US;
        wanted.then_some(head)
    }

    /// Publishes how far the log has come; at most one such post is in flight.
    fn post_mirrored(&mut self) -> Option<Action> {
        let now = if injected(Fault::PublishedAheadOfMemory) {
            (self.end.lsn, self.mirrored_at_end().0)
        } else {
            (self.mirrored_lsn, self.mirrored)
        };
        if self.publishing || !self.is_behind(now) || !self.is_publishing_due(now.0) {
            return None;
        }
        self.published = Some(now);
        self.published_us = self.now_us;
        self.publishing = true;
        let line = Mirrored {
            magic: MIRRORED_MAGIC,
            reserved: 0,
            epoch: self.epoch.0,
            lsn: now.0.0,
            seq: now.1.0,
            time_ns: self.time_ns,
            lag_records: self.lag_records(),
            reserved2: [0; 3],
            crc32c: 0,
        }
        .seal();
        let (body, kind) = (PostBody::None, PostKind::Mirrored);
        Some(self.post(
            MIRRORED_OFFSET,
            line.as_bytes(),
            body,
            kind,
            Effect::Mirrored,
        ))
    }

    /// Moves the head; never beyond what was published before on the same link.
    fn post_head(&mut self) -> Option<Action> {
        let head = self.head_due()?;
        self.published.filter(|(lsn, _)| *lsn >= head.lsn)?;
        let line = HeadSlot {
            magic: HEAD_MAGIC,
            previous_crc32c: head.previous_crc32c,
            epoch: self.epoch.0,
            lsn: head.lsn.0,
            seq: head.seq.0,
            ring_pos: head.ring_pos.0,
            reserved: [0; 2],
            reserved2: 0,
            crc32c: 0,
        }
        .seal();
        let offset = HEAD_OFFSETS[usize::from(self.space.slot != 0)];
        self.space.head_posted(head.lsn);
        self.head_us = self.now_us;
        let effect = Effect::Head { lsn: head.lsn };
        Some(self.post(
            offset,
            line.as_bytes(),
            PostBody::None,
            PostKind::Head,
            effect,
        ))
    }

    fn post_frame(&mut self, ring_crc32c: impl FnOnce(RingPos, u32) -> u32) -> Option<Action> {
        let mark = self
            .mark
            .filter(|m| !self.mark_posted && m.seq < self.end.next_seq.0);
        let (body_len, use_reserve) = match (&self.fill, mark) {
            (Some(fill), _) if fill.abandoned => (0, true),
            (Some(fill), _) => (fill.part.as_ref()?.bytes.len() as u64, false),
            (None, Some(mark)) => (mark.as_bytes().len() as u64, false),
            (None, None) => (u64::from(self.records.get(self.unposted())?.span), false),
        };
        let room = match self.space.place(self.end.lsn, body_len, use_reserve) {
            Place::Here(room) => room,
            Place::AfterPad(stride) => return Some(self.post_pad(stride)),
            Place::Full => {
                self.full = true;
                let told = std::mem::replace(&mut self.full_told, true);
                return (!told).then_some(Action::RegionFull);
            }
        };
        self.full = false;
        if let Some(fill) = self.fill.take() {
            return Some(self.post_fill(fill));
        }
        if let Some(mark) = mark {
            self.mark_posted = true;
            let frame = self.frame(kind::MARK, mark.as_bytes());
            let body = PostBody::Bytes(mark.as_bytes().to_vec());
            return Some(self.push_frame(&frame, body, PostKind::Mark, self.mirrored_at_end()));
        }
        Some(self.post_run(room, ring_crc32c))
    }

    /// Index of the first record that is not in a frame.
    fn unposted(&self) -> usize {
        let left = self.captured.next().0 - self.end.next_seq.0;
        self.records.len().saturating_sub(left as usize)
    }

    /// Where a record begins that is still in the ring.
    fn ring_pos_of(&self, seq: Seq) -> RingPos {
        let later = (self.captured.0 - seq.0) as usize;
        let index = self.records.len().checked_sub(later + 1);
        let record = index.and_then(|index| self.records.get(index));
        record.map_or(RingPos(0), |record| record.ring_pos)
    }

    /// The last complete record once everything posted so far has arrived.
    fn mirrored_at_end(&self) -> (Seq, RingPos) {
        (Seq(self.end.next_seq.0 - 1), self.next_ring_pos)
    }

    fn frame(&self, kind: u8, body: &[u8]) -> Frame {
        Frame {
            kind,
            flags: 0,
            first_seq: self.end.next_seq,
            ring_pos: 0,
            count: 0,
            body_len: body.len() as u32,
            fill_offset: 0,
            body_crc32c: crc32c::crc32c(body),
        }
    }

    fn post_pad(&mut self, stride: u64) -> Action {
        let body_len = (stride - FRAME_HEADER_BYTES) as u32;
        let frame = Frame {
            body_len,
            ..self.frame(kind::PAD, &[])
        };
        // What the log holds before it does not change; while a fill is open its record stays incomplete.
        let (seq, release) = self.mirrored_at_end();
        let effect = if self.fill.is_some() {
            (Seq(0), RingPos(0))
        } else {
            (seq, release)
        };
        self.push_frame(&frame, PostBody::None, PostKind::Pad, effect)
    }

    fn post_fill(&mut self, mut fill: OpenFill) -> Action {
        // An abandoned fill was given room for a header alone, also if its bytes came in meanwhile.
        let (bytes, gone, safe_at) = match fill.part.take().filter(|_| !fill.abandoned) {
            Some(part) => (part.bytes, part.gone, part.safe_at),
            None => (Vec::new(), true, self.captured),
        };
        let begins_at = self.ring_pos_of(fill.pending.seq);
        self.unsafe_fills.note(fill.pending.seq, begins_at, safe_at);
        let len = bytes.len() as u32;
        let last = gone || fill.pending.filled + len == fill.pending.len;
        let mut flags = if last { FILL_LAST } else { 0 };
        flags |= if gone { FILL_GONE } else { 0 };
        let frame = Frame {
            flags,
            first_seq: fill.pending.seq,
            ring_pos: safe_at.0,
            fill_offset: fill.pending.filled,
            ..self.frame(kind::FILL, &bytes)
        };
        let effect = if last {
            self.mirrored_at_end()
        } else {
            (Seq(0), RingPos(0))
        };
        let start = HeadPoint::at(&self.end);
        self.space.push(start, true, fill.pending.seq);
        if !last {
            fill.posted(len);
            self.fill = Some(fill);
        }
        let body = if len == 0 {
            PostBody::None
        } else {
            PostBody::Bytes(bytes)
        };
        self.seal_frame(&frame, body, PostKind::Fill, effect)
    }

    /// As many records as fit in one frame; a record without bytes is its last.
    fn post_run(&mut self, room: u64, ring_crc32c: impl FnOnce(RingPos, u32) -> u32) -> Action {
        let limit = room.min(FRAME_BODY_BYTES_MAX.into());
        let (pos, first_seq) = (self.next_ring_pos, self.end.next_seq);
        let (mut len, mut count, mut lacking) = (0u64, 0u64, None);
        for record in self.records.range(self.unposted()..) {
            if len + u64::from(record.span) > limit {
                break;
            }
            len += u64::from(record.span);
            count += 1;
            if record.needs_fill() {
                lacking = Some(*record);
                break;
            }
        }
        let body_len = len as u32;
        let frame = Frame {
            ring_pos: pos.0,
            count: count as u32,
            body_len,
            body_crc32c: ring_crc32c(pos, body_len),
            ..self.frame(kind::RUN, &[])
        };
        let last = Seq(first_seq.0 + count - 1);
        let ring_end = RingPos(pos.0 + len);
        let effect = match &lacking {
            Some(record) => (Seq(last.0 - 1), record.ring_pos),
            None => (last, ring_end),
        };
        self.space.push(HeadPoint::at(&self.end), false, last);
        let action = self.seal_frame(
            &frame,
            PostBody::Ring { pos, len: body_len },
            PostKind::Run,
            effect,
        );
        self.end.next_seq = last.next();
        self.end.ring_pos_end = Some(ring_end);
        self.next_ring_pos = ring_end;
        self.fill = lacking.map(|record| {
            OpenFill::new(PendingFill {
                seq: last,
                op: record.op,
                identity: record.identity,
                pos: record.pos,
                len: record.data_len,
                filled: 0,
            })
        });
        self.abandon_fill();
        action
    }

    /// A frame that carries no records.
    fn push_frame(
        &mut self,
        frame: &Frame,
        body: PostBody,
        kind: PostKind,
        effect: (Seq, RingPos),
    ) -> Action {
        let last_seq = Seq(self.end.next_seq.0 - 1);
        self.space
            .push(HeadPoint::at(&self.end), self.fill.is_some(), last_seq);
        self.seal_frame(frame, body, kind, effect)
    }

    fn seal_frame(
        &mut self,
        frame: &Frame,
        body: PostBody,
        post: PostKind,
        effect: (Seq, RingPos),
    ) -> Action {
        let header = FrameHeader {
            magic: FRAME_MAGIC,
            version: REGION_VERSION as u8,
            kind: frame.kind,
            flags: frame.flags,
            epoch: self.epoch.0,
            lsn: self.end.lsn.0,
            first_seq: frame.first_seq.0,
            ring_pos: frame.ring_pos,
            count: frame.count,
            body_len: frame.body_len,
            body_crc32c: frame.body_crc32c,
            previous_crc32c: self.end.last_header_crc,
            fill_offset: frame.fill_offset,
            header_crc32c: 0,
        }
        .seal();
        let offset = LOG_OFFSET + self.end.lsn.0 % self.space.log_bytes;
        self.end.lsn = Lsn(self.end.lsn.0 + header.stride());
        self.end.last_header_crc = header.header_crc32c;
        if injected(Fault::AckBeforeCompletion) {
            self.advance(effect.0, RingPos(0));
        }
        if injected(Fault::RingReleasedBeforeCompletion) {
            self.release = self.release.max(effect.1);
        }
        let effect = Effect::Frame {
            lsn: self.end.lsn,
            seq: effect.0,
            release: effect.1,
        };
        self.post(offset, header.as_bytes(), body, post, effect)
    }
}
