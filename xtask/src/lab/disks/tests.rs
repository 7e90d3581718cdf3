use std::io::{Read as _, Write as _};

use super::*;

const BYTES: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn disks() -> (Arc<Disks>, File) {
    let disk = tempfile::tempfile().expect("a file");
    disk.set_len(BYTES).expect("a size");
    let export = Export {
        disk: disk.try_clone().expect("the file"),
        bytes: BYTES,
        state: Mutex::default(),
    };
    let disks = Disks {
        exports: BTreeMap::from([("volume".to_owned(), export)]),
        random: Mutex::new(Random::new(1)),
        flush_us: AtomicU64::new(0),
    };
    (Arc::new(disks), disk)
}

/// As QEMU talks.
struct Client(UnixStream);

impl Client {
    fn connect(disks: &Arc<Disks>, node: NodeName) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let disks = Arc::clone(disks);
        thread::spawn(move || disks.converse(node, theirs));
        let mut client = Self(ours);
        let mut greeting = [0; 18];
        client.0.read_exact(&mut greeting).expect("a greeting");
        client.send(&3_u32.to_be_bytes());
        // An option that is not there, then an export that is not there, then the one that is.
        assert_eq!(client.option(8, &[]), [0x8000_0001]);
        assert_eq!(client.option(7, &go("nothing")), [0x8000_0006]);
        assert_eq!(client.option(7, &go("volume")), [3, 1]);
        client
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the server listens");
    }

    fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).expect("an answer");
        bytes
    }

    /// Kinds of the replies.
    fn option(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
        self.send(b"IHAVEOPT");
        self.send(&option.to_be_bytes());
        self.send(&(data.len() as u32).to_be_bytes());
        self.send(data);
        let mut kinds = Vec::new();
        loop {
            let reply: [u8; 20] = self.receive();
            let kind = u32::from_be_bytes(reply[12..16].try_into().expect("four"));
            let length = u32::from_be_bytes(reply[16..].try_into().expect("four"));
            let mut data = vec![0; length as usize];
            self.0.read_exact(&mut data).expect("its data");
            kinds.push(kind);
            if kind == 3 {
                assert_eq!(data[2..10], BYTES.to_be_bytes());
                continue;
            }
            return kinds;
        }
    }

    /// The answer's error number.
    fn request(&mut self, flags: u16, kind: u16, offset: u64, length: u32, data: &[u8]) -> u32 {
        self.send(&0x2560_9513_u32.to_be_bytes());
        self.send(&flags.to_be_bytes());
        self.send(&kind.to_be_bytes());
        self.send(&77_u64.to_be_bytes());
        self.send(&offset.to_be_bytes());
        self.send(&length.to_be_bytes());
        self.send(data);
        let reply: [u8; 16] = self.receive();
        assert_eq!(reply[8..], 77_u64.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().expect("four"))
    }

    fn write(&mut self, page: u64, value: u8, flags: u16) {
        let bytes = vec![value; PAGE as usize];
        assert_eq!(self.request(flags, 1, page * PAGE, PAGE as u32, &bytes), 0);
    }

    fn read(&mut self, page: u64) -> u8 {
        assert_eq!(self.request(0, 0, page * PAGE, PAGE as u32, &[]), 0);
        let bytes: [u8; PAGE as usize] = self.receive();
        bytes[0]
    }
}

fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(0_u16.to_be_bytes());
    data
}

#[test]
fn a_flush_is_what_the_other_machine_and_the_disk_see() {
    let (disks, _disk) = disks();
    let mut a = Client::connect(&disks, NodeName::A);
    let mut b = Client::connect(&disks, NodeName::B);
    a.write(1, 5, 0);
    assert_eq!((a.read(1), b.read(1)), (5, 0));
    assert_eq!(a.request(0, 3, 0, 0, &[]), 0);
    assert_eq!(b.read(1), 5);
    // Forced past the cache.
    a.write(2, 6, 1);
    assert_eq!(b.read(2), 6);
    assert_eq!(a.request(0, 4, 0, 0, &[]), 22);
    let behind = vec![0; PAGE as usize];
    assert_eq!(a.request(0, 1, BYTES, PAGE as u32, &behind), 5);
}

#[test]
fn a_cut_loses_what_was_not_flushed_and_ends_the_connection() {
    let (disks, disk) = disks();
    let mut a = Client::connect(&disks, NodeName::A);
    let mut b = Client::connect(&disks, NodeName::B);
    for page in 0..64 {
        a.write(page, 1, 0);
    }
    assert_eq!(a.request(0, 3, 0, 0, &[]), 0);
    for page in 0..64 {
        a.write(page, 2, 0);
    }
    b.write(100, 9, 0);
    let losses = disks.power_cut(NodeName::A).expect("a cut");
    assert_eq!(losses.kept + losses.lost, 64);
    let durable = |page: u64| {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&disk, &mut byte, page * PAGE).expect("it");
        byte[0]
    };
    let twos = (0..64).filter(|page| durable(*page) == 2).count() as u64;
    assert_eq!(twos, losses.kept);
    assert!((0..64).all(|page| durable(page) > 0));
    // What is still in the socket of a machine that is off does nothing; a new run of it may write.
    assert_eq!(a.request(0, 1, 0, PAGE as u32, &[3; PAGE as usize]), 5);
    let mut again = Client::connect(&disks, NodeName::A);
    again.write(0, 4, 1);
    assert_eq!(b.read(0), 4);
    // The other machine's cache was not touched.
    assert_eq!((b.read(100), durable(100)), (9, 0));
}
