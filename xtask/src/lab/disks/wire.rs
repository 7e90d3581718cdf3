//! The server's side of the NBD protocol, as much of it as QEMU speaks to a plain export: fixed
//! newstyle, `NBD_OPT_GO`, simple replies, read, write, flush and forced writes.
//!
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>

use std::io::{self, Read, Write};

use anyhow::{Context as _, Result, bail};

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPTION_ABORT: u32 = 2;
const OPTION_GO: u32 = 7;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 0x8000_0001;
const REPLY_UNKNOWN: u32 = 0x8000_0006;

const INFO_EXPORT: u16 = 0;
/// Has flags, takes flush, takes forced writes.
const EXPORT_FLAGS: u16 = 0b1101;

const FLAG_FORCED: u16 = 1;
/// QEMU splits what is larger.
const BYTES_MAX: u32 = 32 << 20;

const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read {
        offset: u64,
        length: usize,
    },
    Write {
        offset: u64,
        bytes: Vec<u8>,
        forced: bool,
    },
    Flush,
    Disconnect,
    Unknown,
}

/// A request with the number its answer carries.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) cookie: u64,
    pub(super) command: Command,
}

/// Agrees with a client on one of the exports; `None` if it leaves instead. `bytes_of` gives the size
/// of an export by its name.
pub(super) fn handshake(
    stream: &mut (impl Read + Write),
    bytes_of: impl Fn(&str) -> Option<u64>,
) -> Result<Option<String>> {
    stream.write_all(GREETING)?;
    stream.write_all(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes())?;
    let _client_flags = read_u32(stream)?;
    loop {
        let magic: [u8; 8] = read(stream)?;
        if &magic != OPTION_MAGIC {
            bail!("the client does not speak NBD's newstyle");
        }
        let option = read_u32(stream)?;
        let length = read_u32(stream)?;
        if length > 64 << 10 {
            bail!("an option of {length} bytes");
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match option {
            OPTION_GO => {
                let name = export_name(&data).context("a damaged NBD_OPT_GO")?;
                let Some(bytes) = bytes_of(&name) else {
                    answer_option(stream, option, REPLY_UNKNOWN, &[])?;
                    continue;
                };
                let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                info.extend(bytes.to_be_bytes());
                info.extend(EXPORT_FLAGS.to_be_bytes());
                answer_option(stream, option, REPLY_INFO, &info)?;
                answer_option(stream, option, REPLY_ACK, &[])?;
                return Ok(Some(name));
            }
            OPTION_ABORT => {
                answer_option(stream, option, REPLY_ACK, &[])?;
                return Ok(None);
            }
            _ => answer_option(stream, option, REPLY_UNSUPPORTED, &[])?,
        }
    }
}

fn export_name(data: &[u8]) -> Option<String> {
    let length = u32::from_be_bytes(data.get(..4)?.try_into().ok()?) as usize;
    let name = data.get(4..4usize.checked_add(length)?)?;
    String::from_utf8(name.to_vec()).ok()
}

fn answer_option(stream: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    reply.extend(option.to_be_bytes());
    reply.extend(kind.to_be_bytes());
    reply.extend((data.len() as u32).to_be_bytes());
    reply.extend(data);
    stream.write_all(&reply)
}

/// The next request.
pub(super) fn request(stream: &mut impl Read) -> Result<Request> {
    let magic = read_u32(stream)?;
    if magic != REQUEST_MAGIC {
        bail!("a request begins with {magic:#x}");
    }
    let flags = u16::from_be_bytes(read(stream)?);
    let kind = u16::from_be_bytes(read(stream)?);
    let cookie = u64::from_be_bytes(read(stream)?);
    let offset = u64::from_be_bytes(read(stream)?);
    let length = read_u32(stream)?;
    if length > BYTES_MAX && kind < 2 {
        bail!("a request for {length} bytes");
    }
    let command = match kind {
        0 => Command::Read {
            offset,
            length: length as usize,
        },
        1 => {
            let mut bytes = vec![0; length as usize];
            stream.read_exact(&mut bytes)?;
            Command::Write {
                offset,
                bytes,
                forced: flags & FLAG_FORCED != 0,
            }
        }
        2 => Command::Disconnect,
        3 => Command::Flush,
        _ => Command::Unknown,
    };
    Ok(Request { cookie, command })
}

/// How a request went.
pub(super) enum Answer<'a> {
    /// Well, with what was read.
    Done(&'a [u8]),
    /// The disk failed.
    Failed,
    /// There is no such command.
    NotUnderstood,
}

/// Answers the request of that number.
pub(super) fn answer(stream: &mut impl Write, cookie: u64, answer: &Answer<'_>) -> io::Result<()> {
    let (error, bytes): (u32, &[u8]) = match answer {
        Answer::Done(bytes) => (0, bytes),
        Answer::Failed => (EIO, &[]),
        Answer::NotUnderstood => (EINVAL, &[]),
    };
    let mut reply = Vec::with_capacity(16 + bytes.len());
    reply.extend(REPLY_MAGIC.to_be_bytes());
    reply.extend(error.to_be_bytes());
    reply.extend(cookie.to_be_bytes());
    reply.extend(bytes);
    stream.write_all(&reply)
}

fn read<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    read(stream).map(u32::from_be_bytes)
}
