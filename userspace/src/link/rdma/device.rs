//! Finds and opens the RDMA device, and chooses the address (GID) that this node shows its peer.
//!
//! It must never guess: a missing device, an inactive port or a port without an address is an
//! error that names the remedy.

use std::ffi::CStr;
use std::io;
use std::mem::zeroed;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{
    ___ibv_query_port, ibv_close_device, ibv_context, ibv_device, ibv_device_attr,
    ibv_free_device_list, ibv_get_device_list, ibv_get_device_name, ibv_gid, ibv_open_device,
    ibv_port_attr, ibv_port_state, ibv_query_device, ibv_query_gid, ibv_transport_type,
};

use super::verbs::{system_error, system_result};
use crate::link::LinkError;

const REMEDY: &str = "load a driver (`modprobe rdma_rxe; rdma link add rxe0 type rxe netdev eth0`), or set `transport = \"tcp\"` on both nodes";
/// Entries of the GID table that are looked at.
const GID_ENTRIES_MAX: i32 = 256;
/// `link_layer` of an Ethernet port; others need a subnet manager's addresses, which are not told.
const LINK_LAYER_ETHERNET: u8 = 2;

/// The 16-byte address of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gid(pub(super) [u8; 16]);

impl Gid {
    /// An IPv4 address in IPv6 form, as RoCE v2 uses it.
    fn is_ipv4(self) -> bool {
        self.0[..10] == [0; 10] && self.0[10..12] == [0xff, 0xff]
    }
}

/// What a port is, as far as a connection needs it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) gid: Gid,
    pub(super) gid_index: u8,
    pub(super) mtu_bytes: u32,
}

/// An open RDMA device with an active port.
#[derive(Debug)]
pub(super) struct Device {
    context: NonNull<ibv_context>,
    name: String,
    port: Port,
}

// SAFETY: libibverbs is thread-safe; the context is closed once, when the last owner is dropped.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the named device, or the first one with an active port.
    pub(super) fn open(wanted: Option<&str>) -> Result<Arc<Self>, LinkError> {
        let list = DeviceList::get()?;
        let mut refusals = Vec::new();
        for (pointer, name) in list.devices() {
            if wanted.is_some_and(|wanted| wanted != name) {
                continue;
            }
            match Self::open_one(pointer, &name) {
                Ok(device) => return Ok(Arc::new(device)),
                Err(error) => refusals.push(error.to_string()),
            }
        }
        let told = match (wanted, refusals.is_empty()) {
            (_, false) => refusals.join("; "),
            (Some(wanted), true) => {
                let there: Vec<_> = list.devices().map(|(_, name)| name).collect();
                let there = if there.is_empty() {
                    "none".to_owned()
                } else {
                    there.join(", ")
                };
                format!(
                    "there is no RDMA device {wanted} (there is: {there}): correct `rdma_device`, or {REMEDY}"
                )
            }
            (None, true) => format!("there is no RDMA device: {REMEDY}"),
        };
        Err(LinkError::NoDevice(told))
    }

    /// Names of the devices of this machine.
    pub(super) fn names() -> Result<Vec<String>, LinkError> {
        Ok(DeviceList::get()?.devices().map(|(_, name)| name).collect())
    }

    fn open_one(pointer: *mut ibv_device, name: &str) -> Result<Self, LinkError> {
        // SAFETY: `pointer` is from the device list, which the caller keeps alive.
        let transport = unsafe { (*pointer).transport_type };
        if transport != ibv_transport_type::IBV_TRANSPORT_IB {
            return Err(LinkError::NoDevice(format!(
                "RDMA device {name} does not speak RoCE: choose another `rdma_device`, or set `transport = \"tcp\"` on both nodes"
            )));
        }
        // SAFETY: as above.
        let context = NonNull::new(unsafe { ibv_open_device(pointer) });
        let context =
            context.ok_or_else(|| system_error(format!("cannot open RDMA device {name}")))?;
        let mut device = Self {
            context,
            name: name.to_owned(),
            port: Port {
                number: 0,
                gid: Gid([0; 16]),
                gid_index: 0,
                mtu_bytes: 0,
            },
        };
        device.port = device.find_port()?;
        Ok(device)
    }

    pub(super) fn context(&self) -> *mut ibv_context {
        self.context.as_ptr()
    }

    pub(super) fn port(&self) -> Port {
        self.port
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn find_port(&self) -> Result<Port, LinkError> {
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut attributes: ibv_device_attr = unsafe { zeroed() };
        // SAFETY: the context is open and the structure is ours to fill.
        let result = unsafe { ibv_query_device(self.context(), &raw mut attributes) };
        system_result(result, || format!("cannot query RDMA device {}", self.name))?;
        for number in 1..=attributes.phys_port_cnt {
            // SAFETY: as above.
            let mut port: ibv_port_attr = unsafe { zeroed() };
            // SAFETY: as above.
            let result = unsafe { ___ibv_query_port(self.context(), number, &raw mut port) };
            system_result(result, || {
                format!("cannot query port {number} of {}", self.name)
            })?;
            let usable = port.state == ibv_port_state::IBV_PORT_ACTIVE
                && port.link_layer == LINK_LAYER_ETHERNET;
            if !usable {
                continue;
            }
            let Some(mtu_bytes) = mtu_to_bytes(port.active_mtu) else {
                continue;
            };
            let Some((gid_index, gid)) = self.choose_gid(number, &port) else {
                continue;
            };
            return Ok(Port {
                number,
                gid,
                gid_index,
                mtu_bytes,
            });
        }
        Err(LinkError::NoDevice(format!(
            "RDMA device {} has no active Ethernet (RoCE) port with an address: bring its network interface up and give it an IP address",
            self.name
        )))
    }

    /// RoCE v2 over IPv4 first, then any RoCE v2, then whatever the port has.
    fn choose_gid(&self, port: u8, attributes: &ibv_port_attr) -> Option<(u8, Gid)> {
        let mut best: Option<(u8, u8, Gid)> = None;
        for index in 0..attributes.gid_tbl_len.min(GID_ENTRIES_MAX) {
            let Some(gid) = self.gid(port, index) else {
                continue;
            };
            let Ok(short) = u8::try_from(index) else {
                break;
            };
            let version_2 = self
                .gid_type(port, index)
                .is_some_and(|kind| kind == "RoCE v2");
            let rank = match (version_2, gid.is_ipv4()) {
                (false, false) => 1,
                (false, true) => 2,
                (true, false) => 3,
                (true, true) => 4,
            };
            if best.is_none_or(|(held, ..)| rank > held) {
                best = Some((rank, short, gid));
            }
        }
        best.map(|(_, index, gid)| (index, gid))
    }

    fn gid(&self, port: u8, index: i32) -> Option<Gid> {
        let mut gid = ibv_gid { raw: [0; 16] };
        // SAFETY: the context is open and the structure is ours to fill.
        let result = unsafe { ibv_query_gid(self.context(), port, index, &raw mut gid) };
        // SAFETY: every 16 bytes are a valid `raw`.
        let raw = unsafe { gid.raw };
        (result == 0 && raw != [0; 16]).then_some(Gid(raw))
    }

    fn gid_type(&self, port: u8, index: i32) -> Option<String> {
        let name = &self.name;
        let path = format!("/sys/class/infiniband/{name}/ports/{port}/gid_attrs/types/{index}");
        Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything made from the context holds an `Arc` of this value, so it is the last.
        if unsafe { ibv_close_device(self.context()) } != 0 {
            tracing::error!(
                "cannot close RDMA device {}: {}",
                self.name,
                io::Error::last_os_error()
            );
        }
    }
}

struct DeviceList {
    list: NonNull<*mut ibv_device>,
    count: usize,
}

impl DeviceList {
    fn get() -> Result<Self, LinkError> {
        let mut count = 0;
        // SAFETY: `count` is ours to fill.
        let list = NonNull::new(unsafe { ibv_get_device_list(&raw mut count) });
        let Some(list) = list else {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::ENOSYS) => LinkError::NoDevice(format!(
                    "the kernel's RDMA modules are not loaded: {REMEDY}"
                )),
                _ => LinkError::System {
                    what: "cannot list RDMA devices".into(),
                    source,
                },
            });
        };
        Ok(Self {
            list,
            count: usize::try_from(count).unwrap_or(0),
        })
    }

    fn devices(&self) -> impl Iterator<Item = (*mut ibv_device, String)> {
        (0..self.count).map(|index| {
            // SAFETY: the list has `count` entries and lives as long as `self`.
            let device = unsafe { *self.list.as_ptr().add(index) };
            // SAFETY: libibverbs names every device of its list by a C string.
            let name = unsafe { CStr::from_ptr(ibv_get_device_name(device)) };
            (device, name.to_string_lossy().into_owned())
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list is from `ibv_get_device_list` and is freed once.
        unsafe { ibv_free_device_list(self.list.as_ptr()) };
    }
}

/// Bytes of an `ibv_mtu` value: 1 is 256, each step doubles, 5 is 4096.
fn mtu_to_bytes(mtu: u32) -> Option<u32> {
    (1..=5).contains(&mtu).then(|| 128 << mtu)
}

/// The largest `ibv_mtu` value that is not above `bytes`.
pub(super) fn mtu_from_bytes(bytes: u32) -> Option<u32> {
    (1..=5)
        .rev()
        .find(|mtu| mtu_to_bytes(*mtu).is_some_and(|size| size <= bytes))
}
