//! One end of a reliable connection.
//!
//! A queue pair talks to exactly one other, named by number and address, and breaks rather than
//! losing or reordering a write. It must outlive no memory it reads from: owners drop it first.

use std::mem::zeroed;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_sys::{
    ibv_access_flags, ibv_create_qp, ibv_destroy_qp, ibv_gid, ibv_modify_qp, ibv_post_send, ibv_qp,
    ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_send_flags,
    ibv_send_wr, ibv_sge, ibv_wr_opcode, rdma_t,
};

use super::device::{Gid, mtu_from_bytes};
use super::verbs::{CompletionQueue, ProtectionDomain, system_error, system_result};
use crate::link::LinkError;

/// Acknowledgement timeout: 4.096 us * 2^16 = 268 ms.
const ACKNOWLEDGE_TIMEOUT: u8 = 16;
/// Retries before the connection breaks: with the timeout above a dead peer is noticed after
/// 7 * 268 ms = 1.9 s. Never 7, which soft-RoCE takes as "for ever", so that the link never breaks.
const RETRIES: u8 = 6;
/// Receiver-not-ready timers do not matter: an RDMA write consumes no receive request.
const RECEIVER_NOT_READY_TIMER: u8 = 12;
const RECEIVER_NOT_READY_RETRIES: u8 = 7;
const HOP_LIMIT: u8 = 64;
/// Pieces of local memory in one write: the head in the slab, the run in the ring.
pub(super) const PIECES_MAX: usize = 2;
/// Packet sequence numbers have 24 bits.
pub(super) const PSN_MASK: u32 = 0x00ff_ffff;

/// The other end, as it told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remote {
    pub(super) qp_number: u32,
    pub(super) psn: u32,
    pub(super) gid: Gid,
    pub(super) mtu_bytes: u32,
}

/// A piece of registered memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

/// Where a write goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) address: u64,
    pub(super) key: u32,
}

/// What the peer's end may do to this node's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PeerMay {
    /// Nothing: this end writes.
    Nothing,
    /// Write to what is registered for it.
    Write,
}

/// A reliable-connected queue pair, from INIT on.
#[derive(Debug)]
pub(super) struct QueuePair {
    pointer: Option<NonNull<ibv_qp>>,
    number: u32,
    psn: u32,
    domain: Arc<ProtectionDomain>,
    _completions: Arc<CompletionQueue>,
}

// SAFETY: libibverbs is thread-safe; the queue pair is destroyed once.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes one with room for `depth` writes, ready to be connected.
    pub(super) fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        depth: u32,
        psn: u32,
        peer_may: PeerMay,
    ) -> Result<Self, LinkError> {
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut wanted: ibv_qp_init_attr = unsafe { zeroed() };
        wanted.send_cq = completions.pointer();
        wanted.recv_cq = completions.pointer();
        wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = depth;
        wanted.cap.max_recv_wr = 1;
        wanted.cap.max_send_sge = PIECES_MAX as u32;
        wanted.cap.max_recv_sge = 1;
        // SAFETY: domain and completion queue are live and of the same device.
        let pointer = NonNull::new(unsafe { ibv_create_qp(domain.pointer(), &raw mut wanted) });
        let pointer = pointer.ok_or_else(|| {
            system_error(format!(
                "cannot create a queue pair on {}",
                domain.device().name()
            ))
        })?;
        // SAFETY: libibverbs returned a live queue pair.
        let number = unsafe { pointer.as_ref().qp_num };
        let pair = Self {
            pointer: Some(pointer),
            number,
            psn: psn & PSN_MASK,
            domain: Arc::clone(domain),
            _completions: Arc::clone(completions),
        };
        pair.initialise(peer_may)?;
        Ok(pair)
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn psn(&self) -> u32 {
        self.psn
    }

    fn initialise(&self, peer_may: PeerMay) -> Result<(), LinkError> {
        use ibv_qp_attr_mask as mask;
        let access = match peer_may {
            PeerMay::Nothing => ibv_access_flags(0),
            PeerMay::Write => ibv_access_flags::IBV_ACCESS_REMOTE_WRITE,
        };
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut wanted: ibv_qp_attr = unsafe { zeroed() };
        wanted.qp_state = ibv_qp_state::IBV_QPS_INIT;
        wanted.port_num = self.domain.device().port().number;
        wanted.qp_access_flags = access.0;
        let set = mask::IBV_QP_STATE
            | mask::IBV_QP_PKEY_INDEX
            | mask::IBV_QP_PORT
            | mask::IBV_QP_ACCESS_FLAGS;
        self.modify(wanted, set, "initialise")
    }

    /// Connects to exactly this peer; from now on both can send.
    pub(super) fn connect(&self, remote: &Remote) -> Result<(), LinkError> {
        use ibv_qp_attr_mask as mask;
        let port = self.domain.device().port();
        let mtu = mtu_from_bytes(remote.mtu_bytes.min(port.mtu_bytes)).ok_or_else(|| {
            let bytes = remote.mtu_bytes;
            LinkError::Refused(format!("the peer's path MTU of {bytes} bytes is below 256"))
        })?;
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut wanted: ibv_qp_attr = unsafe { zeroed() };
        wanted.qp_state = ibv_qp_state::IBV_QPS_RTR;
        wanted.path_mtu = mtu;
        wanted.dest_qp_num = remote.qp_number;
        wanted.rq_psn = remote.psn & PSN_MASK;
        wanted.max_dest_rd_atomic = 1;
        wanted.min_rnr_timer = RECEIVER_NOT_READY_TIMER;
        wanted.ah_attr.is_global = 1;
        wanted.ah_attr.port_num = port.number;
        wanted.ah_attr.grh.dgid = ibv_gid { raw: remote.gid.0 };
        wanted.ah_attr.grh.sgid_index = port.gid_index;
        wanted.ah_attr.grh.hop_limit = HOP_LIMIT;
        let set = mask::IBV_QP_STATE
            | mask::IBV_QP_AV
            | mask::IBV_QP_PATH_MTU
            | mask::IBV_QP_DEST_QPN
            | mask::IBV_QP_RQ_PSN
            | mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(wanted, set, "connect (ready to receive)")?;
        self.ready_to_send()
    }

    fn ready_to_send(&self) -> Result<(), LinkError> {
        use ibv_qp_attr_mask as mask;
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut wanted: ibv_qp_attr = unsafe { zeroed() };
        wanted.qp_state = ibv_qp_state::IBV_QPS_RTS;
        wanted.sq_psn = self.psn;
        wanted.timeout = ACKNOWLEDGE_TIMEOUT;
        wanted.retry_cnt = RETRIES;
        wanted.rnr_retry = RECEIVER_NOT_READY_RETRIES;
        wanted.max_rd_atomic = 1;
        let set = mask::IBV_QP_STATE
            | mask::IBV_QP_TIMEOUT
            | mask::IBV_QP_RETRY_CNT
            | mask::IBV_QP_RNR_RETRY
            | mask::IBV_QP_SQ_PSN
            | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(wanted, set, "connect (ready to send)")
    }

    /// Sends nothing more, and takes nothing more in; what is under way ends as an error.
    pub(super) fn stop(&self) -> Result<(), LinkError> {
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut wanted: ibv_qp_attr = unsafe { zeroed() };
        wanted.qp_state = ibv_qp_state::IBV_QPS_ERR;
        self.modify(wanted, ibv_qp_attr_mask::IBV_QP_STATE, "stop")
    }

    fn modify(
        &self,
        mut wanted: ibv_qp_attr,
        set: ibv_qp_attr_mask,
        what: &str,
    ) -> Result<(), LinkError> {
        let pointer = self.live()?;
        let mask = i32::try_from(set.0).unwrap_or(0);
        // SAFETY: the queue pair is live, and `wanted` is ours.
        let result = unsafe { ibv_modify_qp(pointer, &raw mut wanted, mask) };
        system_result(result, || {
            format!("cannot {what} queue pair {}", self.number)
        })
    }

    /// Posts one signalled RDMA write.
    pub(super) fn post_write(
        &mut self,
        number: u64,
        pieces: &[Piece],
        target: Target,
    ) -> Result<(), LinkError> {
        let none = ibv_sge {
            addr: 0,
            length: 0,
            lkey: 0,
        };
        let mut list = [none; PIECES_MAX];
        if pieces.len() > PIECES_MAX {
            return Err(LinkError::Refused(format!(
                "{} pieces in one write",
                pieces.len()
            )));
        }
        for (entry, piece) in list.iter_mut().zip(pieces) {
            *entry = ibv_sge {
                addr: piece.address,
                length: piece.len,
                lkey: piece.key,
            };
        }
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut request: ibv_send_wr = unsafe { zeroed() };
        request.wr_id = number;
        request.sg_list = list.as_mut_ptr();
        request.num_sge = pieces.len() as i32;
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        request.wr.rdma = rdma_t {
            remote_addr: target.address,
            rkey: target.key,
        };
        let mut refused = null_mut();
        let pointer = self.live()?;
        // SAFETY: the queue pair is live; request and list live until the call returns, which
        // copies them; the registered memory they name outlives the queue pair (its owner's order).
        let result = unsafe { ibv_post_send(pointer, &raw mut request, &raw mut refused) };
        system_result(result, || {
            format!("cannot post a write on queue pair {}", self.number)
        })
    }

    /// Ends the connection for good and says whether that worked: afterwards the peer reaches nothing.
    pub(super) fn destroy(mut self) -> Result<(), LinkError> {
        self.undo()
    }

    fn live(&self) -> Result<*mut ibv_qp, LinkError> {
        let gone = || LinkError::Broken("the queue pair is destroyed".into());
        self.pointer.map(NonNull::as_ptr).ok_or_else(gone)
    }

    fn undo(&mut self) -> Result<(), LinkError> {
        let Some(pointer) = self.pointer.take() else {
            return Ok(());
        };
        // SAFETY: the queue pair is live and taken out, so it is destroyed once.
        let result = unsafe { ibv_destroy_qp(pointer.as_ptr()) };
        system_result(result, || {
            format!("cannot destroy queue pair {}", self.number)
        })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::error!("{error}");
        }
    }
}
