//! Sleeping until a link may have news.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::link::Link;

/// Sleeps until the link's event descriptor is readable; `false` if that took longer than `timeout`.
/// Arm the link and poll it once before.
///
/// # Errors
/// The system's, or that the link has no descriptor.
pub fn wait_readable(link: &dyn Link, timeout: Duration) -> io::Result<bool> {
    let fd = link
        .event_fd()
        .ok_or_else(|| io::Error::other("the link has no event descriptor"))?;
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], limit) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
