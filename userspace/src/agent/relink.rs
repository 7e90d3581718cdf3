//! Making a broken link anew, on a thread of its own: the mirror may answer late or never, and meanwhile
//! the records must be counted and the lag be judged.
//!
//! It never has two tries under way, and never decides what a try that succeeds is good for.

use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

/// A broken link is made anew this often while the epoch waits for it.
pub const EVERY: Duration = Duration::from_millis(200);

/// The tries to make one link.
#[derive(Debug)]
pub struct Relink<T> {
    due: Instant,
    pending: Option<Receiver<anyhow::Result<T>>>,
    broken_since: Option<Instant>,
}

impl<T: Send + 'static> Relink<T> {
    /// The link is whole.
    pub fn new() -> Self {
        Self {
            due: Instant::now(),
            pending: None,
            broken_since: None,
        }
    }

    /// The link works.
    pub fn is_whole(&mut self) {
        self.broken_since = None;
    }

    /// How long the link has been gone, as far as this was told.
    pub fn gone_for(&mut self) -> Duration {
        self.broken_since.get_or_insert_with(Instant::now).elapsed()
    }

    /// The outcome of the try under way, once it is there; begins one if it is time.
    pub fn turn(
        &mut self,
        open: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> Option<anyhow::Result<T>> {
        if let Some(pending) = &self.pending {
            let result = match pending.try_recv() {
                Err(TryRecvError::Empty) => return None,
                Ok(result) => result,
                Err(TryRecvError::Disconnected) => {
                    Err(anyhow::anyhow!("the thread that makes the link ended"))
                }
            };
            self.pending = None;
            return Some(result);
        }
        if Instant::now() < self.due {
            return None;
        }
        self.due = Instant::now() + EVERY;
        let (tell, told) = channel();
        let work = move || {
            // Nobody waits for it if the epoch has ended.
            tell.send(open()).ok();
        };
        let thread = std::thread::Builder::new().name("relink".into());
        match thread.spawn(work) {
            Ok(_) => {
                self.pending = Some(told);
                None
            }
            Err(error) => Some(Err(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(relink: &mut Relink<u32>, value: u32) -> anyhow::Result<u32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(result) = relink.turn(move || Ok(value)) {
                return result;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        anyhow::bail!("no outcome")
    }

    #[test]
    fn a_try_that_hangs_holds_up_nobody_and_no_second_one_begins() {
        let mut relink = Relink::new();
        let (release, held) = channel::<()>();
        let first = relink.turn(move || Ok(held.recv().map_or(1, |()| 1)));
        assert!(first.is_none());
        for _ in 0..1000 {
            assert!(
                relink.turn(|| Ok(2)).is_none(),
                "the first one is under way"
            );
        }
        release.send(()).unwrap();
        assert_eq!(outcome(&mut relink, 2).unwrap(), 1);
        assert_eq!(outcome(&mut relink, 3).unwrap(), 3);
    }

    #[test]
    fn a_try_that_dies_is_an_error_and_the_time_counts_from_the_break() {
        let mut relink: Relink<u32> = Relink::new();
        let (tell, told) = channel();
        drop(tell);
        relink.pending = Some(told);
        assert!(relink.turn(|| Ok(1)).unwrap().is_err());
        let first = relink.gone_for();
        std::thread::sleep(Duration::from_millis(3));
        assert!(relink.gone_for() > first);
        relink.is_whole();
        assert!(relink.gone_for() < Duration::from_secs(10));
    }
}
