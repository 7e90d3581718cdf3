use std::mem::offset_of;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::Arc;

use rdma_sys::{
    ibv_comp_channel, ibv_device_attr, ibv_gid, ibv_global_route, ibv_mr, ibv_port_attr, ibv_qp,
    ibv_qp_attr, ibv_qp_init_attr, ibv_send_wr, ibv_sge, ibv_wc,
};

use super::device::mtu_from_bytes;
use super::memory::{MemoryError, SharedMemory};
use super::probe_ring::ProbeRing;
use crate::ids::RingPos;
use crate::link::LinkError;

/// Names a structure with its fields, and what Rust thinks of their places.
macro_rules! layout {
    ($name:ident: $($field:ident $(. $inner:ident)*),*) => {
        (
            stringify!($name),
            size_of::<$name>(),
            vec![$((
                concat!(stringify!($field) $(, ".", stringify!($inner))*),
                offset_of!($name, $field $(. $inner)*),
            )),*],
        )
    };
}

/// The bindings' unions are written by hand, so the compiler of the headers has the last word.
#[test]
fn the_bindings_lay_structures_out_as_c_does() {
    let layouts = [
        layout!(ibv_sge: addr, length, lkey),
        layout!(ibv_send_wr: wr_id, next, sg_list, num_sge, opcode, send_flags, wr.rdma.remote_addr, wr.rdma.rkey),
        layout!(ibv_wc: wr_id, status, opcode, vendor_err, byte_len, qp_num),
        layout!(ibv_qp_init_attr: send_cq, recv_cq, cap, qp_type, sq_sig_all),
        layout!(ibv_qp_attr: qp_state, path_mtu, rq_psn, sq_psn, dest_qp_num, qp_access_flags, ah_attr,
            max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry),
        layout!(ibv_global_route: dgid, flow_label, sgid_index, hop_limit, traffic_class),
        layout!(ibv_gid: raw),
        layout!(ibv_port_attr: state, active_mtu, gid_tbl_len, link_layer),
        layout!(ibv_device_attr: phys_port_cnt),
        layout!(ibv_mr: lkey, rkey),
        layout!(ibv_qp: qp_num),
        layout!(ibv_comp_channel: fd),
    ];
    let mut program = String::from("#include <infiniband/verbs.h>\n#include <stddef.h>\n");
    for (name, size, fields) in &layouts {
        // `ibv_gid` is a union in C.
        let kind = if *name == "ibv_gid" {
            "union"
        } else {
            "struct"
        };
        program += &format!("_Static_assert(sizeof({kind} {name}) == {size}, \"{name}\");\n");
        for (field, offset) in fields {
            program += &format!(
                "_Static_assert(offsetof({kind} {name}, {field}) == {offset}, \"{name}.{field}\");\n"
            );
        }
    }
    let wrong = program.replace("(struct ibv_wc) == ", "(struct ibv_wc) == 1");
    assert_eq!(
        (compiles(&program), compiles(&wrong)),
        (Ok(()), Err(())),
        "{program}"
    );
}

fn compiles(program: &str) -> Result<(), ()> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("layout.c");
    std::fs::write(&source, program).unwrap();
    let status = Command::new("cc")
        .arg("-fsyntax-only")
        .arg(&source)
        .status()
        .unwrap();
    if status.success() { Ok(()) } else { Err(()) }
}

#[test]
fn mtu_is_the_largest_that_fits() {
    let cases = [
        (255, None),
        (256, Some(1)),
        (1023, Some(2)),
        (4096, Some(5)),
        (9000, Some(5)),
    ];
    for (bytes, wanted) in cases {
        assert_eq!(mtu_from_bytes(bytes), wanted, "{bytes}");
    }
}

#[test]
fn a_machine_without_rdma_is_told_the_remedy() {
    match super::RdmaTransport::new(Some("no-such-device")) {
        Err(LinkError::NoDevice(told)) => assert!(told.contains("modprobe rdma_rxe"), "{told}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn copies_are_right_at_every_alignment_and_bounds_are_kept() {
    let memory = SharedMemory::anonymous(100).unwrap();
    let pattern: Vec<u8> = (1..=100).collect();
    for start in 0..20 {
        for len in 0..60 {
            memory.zero(0, 100).unwrap();
            memory.write_at(start, &pattern[..len]).unwrap();
            let mut whole = vec![0; 100];
            memory.read_at(0, &mut whole).unwrap();
            let mut wanted = vec![0; 100];
            wanted[start as usize..][..len].copy_from_slice(&pattern[..len]);
            assert_eq!(whole, wanted, "{start} {len}");
            let mut part = vec![0; len];
            memory.read_at(start, &mut part).unwrap();
            assert_eq!(part, &pattern[..len], "{start} {len}");
        }
    }
    for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (u64::MAX, 0)] {
        let mut to = vec![0; len];
        let read = memory.read_at(offset, &mut to);
        let written = memory.write_at(offset, &to);
        let zeroed = memory.zero(offset, len as u64);
        for result in [read, written, zeroed] {
            assert!(
                matches!(result, Err(MemoryError::OutOfBounds { .. })),
                "{offset} {len}"
            );
        }
    }
    assert!(memory.zero(1, u64::MAX).is_err());
}

#[test]
fn a_file_is_allocated_at_once_and_opens_with_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    let made = SharedMemory::create(&path, 1 << 20).unwrap();
    let file = std::fs::metadata(&path).unwrap();
    assert_eq!((file.len(), file.mode() & 0o777), (1 << 20, 0o600));
    assert!(file.blocks() * 512 >= 1 << 20, "{} blocks", file.blocks());
    made.write_at(4097, b"shared").unwrap();
    let opened = SharedMemory::open_sized(&path, 1 << 20).unwrap();
    let mut bytes = [0; 6];
    opened.read_at(4097, &mut bytes).unwrap();
    assert_eq!(&bytes, b"shared");
    for wrong in [(1 << 20) - 1, (1 << 20) + 1, 0] {
        let error = SharedMemory::open_sized(&path, wrong).unwrap_err();
        assert!(matches!(error, MemoryError::WrongSize { .. }), "{error}");
    }
    assert!(SharedMemory::create(&path, 0).is_err());
    assert!(SharedMemory::open(&dir.path().join("absent")).is_err());
    assert!(SharedMemory::anonymous(u64::MAX).is_err());
}

#[test]
fn a_run_over_the_rings_end_is_one_span() {
    let ring = ProbeRing::of_ordinary_pages(8192).unwrap();
    let bytes: Vec<u8> = (0..8192_u32).map(|at| (at / 7) as u8).collect();
    ring.fill().write_at(0, &bytes).unwrap();
    let twice = [bytes.as_slice(), &bytes].concat();
    let copy = Arc::new(SharedMemory::anonymous(8192).unwrap());
    for (pos, len) in [
        (0, 8192),
        (8191, 8192),
        (3 * 8192 - 100, 200),
        (5, 3),
        (u64::MAX, 9),
    ] {
        ring.source().copy_to(RingPos(pos), len, &copy, 0).unwrap();
        let mut found = vec![0; len as usize];
        copy.read_at(0, &mut found).unwrap();
        assert_eq!(
            found,
            &twice[(pos % 8192) as usize..][..len as usize],
            "{pos} {len}"
        );
    }
    let over = ring.source().run(RingPos(0), 8193);
    assert!(matches!(over, Err(LinkError::Refused(_))));
    assert!(ring.source().copy_to(RingPos(0), 100, &copy, 8100).is_err());
    for wrong in [0, 100, 4097] {
        assert!(ProbeRing::of_ordinary_pages(wrong).is_err());
    }
}
