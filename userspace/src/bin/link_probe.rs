//! Tries a transport on real machines: the contract with both ends in this process, or one end in
//! each of two. For tests and for people who want to know whether their network can do it.
//!
//! Its control connection knows no authentication: never leave it running.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use twinwrite::config::TransportKind;
use twinwrite::ids::RingPos;
use twinwrite::link::contract::contract;
use twinwrite::link::rdma::RdmaTransport;
use twinwrite::link::rdma::probe_ring::ProbeRing;
use twinwrite::link::{
    Body, Endpoint, Link, LinkError, Post, PostId, SharedMemory, Transport, open_transport,
    wait_readable,
};

/// Bytes of the memory that `serve` exposes.
const MEMORY_BYTES: u64 = 16 << 20;
/// Bytes of the ring that `write` sends from.
const RING_BYTES: usize = 1 << 20;

#[derive(Parser)]
#[command(about = "Tries a link between two machines, or both ends of it on one")]
struct Arguments {
    /// Which transport.
    #[arg(long, value_enum, default_value = "rdma")]
    transport: Kind,
    /// RDMA device; default: the first one.
    #[arg(long)]
    device: Option<String>,
    /// This machine's address, for TCP.
    #[arg(long, default_value = "127.0.0.1")]
    local: IpAddr,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Rdma,
    Tcp,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pages {
    /// The kernel's ring-buffer pages.
    Kernel,
    /// A memory file's pages.
    Ordinary,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the transport contract with both ends here.
    Contract {
        /// What the ring is made of.
        #[arg(long, value_enum, default_value = "kernel")]
        ring: Pages,
    },
    /// Says whether RDMA may read a ring's own memory on this kernel.
    Ring,
    /// Exposes memory to one writer after the other.
    Serve {
        /// Where writers connect to.
        #[arg(long)]
        listen: SocketAddr,
        /// File to expose; default: anonymous memory.
        #[arg(long)]
        memory: Option<PathBuf>,
    },
    /// Writes ring bytes to a `serve`, and compares what arrived.
    Write {
        /// Its address.
        #[arg(long)]
        peer: SocketAddr,
        /// How many posts.
        #[arg(long, default_value_t = 2000)]
        posts: u64,
        /// Bytes of each.
        #[arg(long, default_value_t = 4096)]
        bytes: u32,
    },
    /// Writes to a `serve` until the link breaks, and says how long that took.
    Stream {
        /// Its address.
        #[arg(long)]
        peer: SocketAddr,
        /// Time between two posts, in milliseconds.
        #[arg(long, default_value_t = 20)]
        pause_ms: u64,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let kind = match arguments.transport {
        Kind::Rdma => TransportKind::Rdma,
        Kind::Tcp => TransportKind::Tcp,
    };
    let device = arguments.device.as_deref();
    let transport = open_transport(kind, device, arguments.local)?;
    match arguments.command {
        Command::Contract { ring } => run_contract(transport.as_ref(), ring),
        Command::Ring => run_ring(device),
        Command::Serve { listen, memory } => serve(transport.as_ref(), listen, memory),
        Command::Write { peer, posts, bytes } => write(transport.as_ref(), peer, posts, bytes),
        Command::Stream { peer, pause_ms } => {
            stream(transport.as_ref(), peer, Duration::from_millis(pause_ms))
        }
    }
}

fn make_ring(pages: Pages) -> Result<Arc<ProbeRing>> {
    Ok(match pages {
        Pages::Kernel => ProbeRing::of_kernel_pages(RING_BYTES)?,
        Pages::Ordinary => ProbeRing::of_ordinary_pages(RING_BYTES)?,
    })
}

fn run_contract(transport: &dyn Transport, pages: Pages) -> Result<()> {
    let ring = make_ring(pages)?;
    let passed = contract(transport, &ring).map_err(anyhow::Error::msg)?;
    for name in &passed {
        println!("ok: {name}");
    }
    println!("contract: {} checks passed", passed.len());
    Ok(())
}

fn run_ring(device: Option<&str>) -> Result<()> {
    let transport = RdmaTransport::new(device)?;
    for (name, pages) in [("kernel", Pages::Kernel), ("ordinary", Pages::Ordinary)] {
        let answer = transport.can_register(&make_ring(pages)?.source())?;
        println!("{name} pages, read-only: zero_copy={answer}");
    }
    Ok(())
}

/// One line of JSON each way: the endpoints. Then the writer asks, a line each.
fn serve(transport: &dyn Transport, listen: SocketAddr, path: Option<PathBuf>) -> Result<()> {
    let memory = Arc::new(match path {
        Some(path) => SharedMemory::create(&path, MEMORY_BYTES)?,
        None => SharedMemory::anonymous(MEMORY_BYTES)?,
    });
    let listener = TcpListener::bind(listen).context("cannot listen")?;
    println!("serving {MEMORY_BYTES} bytes");
    loop {
        let (control, from) = listener.accept()?;
        match serve_one(transport, &memory, control) {
            Ok(()) => println!("{from} is done"),
            Err(error) => println!("{from}: {error:#}"),
        }
    }
}

fn serve_one(
    transport: &dyn Transport,
    memory: &Arc<SharedMemory>,
    control: TcpStream,
) -> Result<()> {
    let mut exposed = transport.expose(Arc::clone(memory))?;
    let mut answers = control.try_clone()?;
    let mut lines = BufReader::new(control).lines();
    let hello = lines.next().context("the writer said nothing")??;
    exposed.accept(&serde_json::from_str::<Endpoint>(&hello)?)?;
    writeln!(answers, "{}", serde_json::to_string(&exposed.endpoint())?)?;
    for line in lines {
        if line? == "crc" {
            writeln!(answers, "{}", checksum(memory)?)?;
        }
    }
    exposed.revoke()?;
    Ok(())
}

fn checksum(memory: &SharedMemory) -> Result<u32> {
    let mut bytes = vec![0; usize::try_from(memory.len())?];
    memory.read_at(0, &mut bytes)?;
    Ok(crc32c::crc32c(&bytes))
}

/// The control connection of a writer.
struct Control {
    out: TcpStream,
    lines: std::io::Lines<BufReader<TcpStream>>,
}

fn connect(
    transport: &dyn Transport,
    peer: SocketAddr,
    ring: &Arc<ProbeRing>,
) -> Result<(Control, Box<dyn Link>)> {
    let out = TcpStream::connect(peer).context("cannot reach the peer")?;
    let lines = BufReader::new(out.try_clone()?).lines();
    let mut control = Control { out, lines };
    let outgoing = transport.outgoing(Some(ring.source()))?;
    let told = serde_json::to_string(&outgoing.endpoint())?;
    let answer = control.ask(&told)?;
    let link = outgoing.connect(&serde_json::from_str::<Endpoint>(&answer)?)?;
    Ok((control, link))
}

impl Control {
    fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.out, "{line}")?;
        Ok(self.lines.next().context("the peer hung up")??)
    }
}

/// Polls, and sleeps if there is nothing.
fn wait(link: &mut dyn Link, completed: &mut Vec<PostId>) -> Result<(), LinkError> {
    let before = completed.len();
    link.poll(completed)?;
    if completed.len() > before {
        return Ok(());
    }
    link.arm(true)?;
    link.poll(completed)?;
    if completed.len() == before {
        let slept = wait_readable(link, Duration::from_millis(500));
        slept.map_err(|source| LinkError::System {
            what: "cannot sleep".into(),
            source,
        })?;
    }
    Ok(())
}

fn write(transport: &dyn Transport, peer: SocketAddr, posts: u64, bytes: u32) -> Result<()> {
    ensure!(
        bytes > 0 && u64::from(bytes) <= RING_BYTES as u64,
        "bytes are out of range"
    );
    let ring = make_ring(Pages::Kernel)?;
    let pattern: Vec<u8> = (0..RING_BYTES as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect();
    ring.fill().write_at(0, &pattern)?;
    let twice = pattern.repeat(2);
    let (mut control, mut link) = connect(transport, peer, &ring)?;
    let model = SharedMemory::anonymous(MEMORY_BYTES)?;
    let mut completed = Vec::new();
    let began = Instant::now();
    for id in 0..posts {
        while link.room() == 0 {
            wait(link.as_mut(), &mut completed)?;
        }
        let pos = id * 104_729;
        let offset = id * 65_521 % (MEMORY_BYTES - u64::from(bytes) - 8);
        let head = id.to_le_bytes();
        let body = Body::Ring {
            pos: RingPos(pos),
            len: bytes,
        };
        link.post(&Post {
            id: PostId(id),
            offset,
            head: &head,
            body,
        })?;
        model.write_at(offset, &head)?;
        let start = (pos % RING_BYTES as u64) as usize;
        let run = twice
            .get(start..start + bytes as usize)
            .context("a run outside the ring")?;
        model.write_at(offset + 8, run)?;
    }
    while (completed.len() as u64) < posts {
        wait(link.as_mut(), &mut completed)?;
    }
    let took = began.elapsed();
    ensure!(
        completed.iter().map(|id| id.0).eq(0..posts),
        "completions out of order"
    );
    // The peer's memory was zero before the first writer only.
    let (found, wanted) = (control.ask("crc")?, checksum(&model)?.to_string());
    ensure!(
        found == wanted,
        "the peer's memory differs: {found} instead of {wanted}"
    );
    let rate = posts as f64 / took.as_secs_f64();
    println!(
        "{posts} posts of {bytes} bytes right, {rate:.0} a second, zero_copy={}",
        link.zero_copy()
    );
    Ok(())
}

fn stream(transport: &dyn Transport, peer: SocketAddr, pause: Duration) -> Result<()> {
    let ring = make_ring(Pages::Kernel)?;
    let (_control, mut link) = connect(transport, peer, &ring)?;
    let mut completed = Vec::new();
    let mut last = Instant::now();
    println!("streaming");
    for id in 0.. {
        let body = Body::Ring {
            pos: RingPos(id * 4096),
            len: 4096,
        };
        let post = Post {
            id: PostId(id),
            offset: 0,
            head: &[],
            body,
        };
        let result = match link.room() {
            0 => Ok(()),
            _ => link.post(&post),
        };
        let before = completed.len();
        match result.and_then(|()| link.poll(&mut completed)) {
            Ok(()) if completed.len() > before => last = Instant::now(),
            Ok(()) => {}
            Err(LinkError::Broken(why)) => {
                let silent_ms = last.elapsed().as_millis();
                let done = completed.len();
                println!("broken {silent_ms} ms after the last of {done} completions: {why}");
                return Ok(());
            }
            Err(other) => return Err(other.into()),
        }
        if last.elapsed() > Duration::from_secs(30) {
            bail!("no completion for 30 s, and the link is not broken");
        }
        std::thread::sleep(pause);
    }
    Ok(())
}
