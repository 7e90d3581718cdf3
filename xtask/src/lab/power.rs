//! Power and wire: boot, crash, cut, heal.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use super::config::NodeName;
use super::protocol::{MachineEnd, MachineStatus, Reply, Request};
use super::{AgentAction, Lab, Service};
use crate::progress::{self, tail};

/// Seconds under emulation; minutes if the host is busy.
const READY_LIMIT: Duration = Duration::from_secs(180);
const DEATH_LIMIT_S: u64 = 60;

/// How a machine dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CrashKind {
    /// Its power is cut: QEMU gets SIGKILL.
    #[default]
    #[value(name = "kill")]
    Kill,
    /// Its kernel panics.
    #[value(name = "sysrq-c")]
    SysrqC,
    /// Its kernel resets at once, without a sync.
    #[value(name = "sysrq-b")]
    SysrqB,
}

/// What a kernel says that the emulator broke while it patched its own code: a breakpoint that it has
/// already taken back, and a fault in what patches before there is any user space.
const EMULATOR_OOPSES: [&str; 2] = ["Oops: int3", "RIP: 0010:text_poke_early+"];
/// How an emulator ends that fell over itself: abort, bus error, illegal instruction, segmentation
/// fault. Nothing that a guest does may bring that about.
const EMULATOR_ENDS: [&str; 4] = ["signal 6", "signal 7", "signal 4", "signal 11"];
/// What a kernel says when a processor sleeps on although its timer has run out. Before a machine takes
/// commands nothing of what is tested runs on it: the emulator has lost that interrupt.
const LOST_TIMER: &str = "kthread timer wakeup didn't happen";
/// What a machine's first process says at once.
const STARTED: &str = "LABSTART";
/// A kernel that has not come to its first process by then hangs: on a busy host it takes 20 seconds.
const START_LIMIT: Duration = Duration::from_secs(90);
/// A machine is started so often at the most before it takes commands.
pub(super) const BOOTS_MAX: usize = 4;

impl Lab {
    /// Crashes a machine and makes sure that it lived before and died in just this way. Gives the
    /// host's time of its end, milliseconds since 1970.
    ///
    /// # Errors
    /// If it was dead, does not die, or died of something else.
    pub fn crash(&self, node: NodeName, kind: CrashKind) -> Result<i64> {
        let before = self.machine(node)?;
        if let Some(end) = before.ended {
            bail!("machine {node} was dead before the crash ({})", end.how);
        }
        let alive = self.exec(node, "true", Duration::from_secs(30));
        if !alive.is_ok_and(|output| output.status == 0) {
            bail!("machine {node} did not answer before the crash");
        }
        self.bring_about(node, kind)?;
        self.await_death(node)?;
        let after = self.machine(node)?;
        let console = fs::read(self.console_log(node)).unwrap_or_default();
        let at_ms = judge(&after, kind, &String::from_utf8_lossy(&console))
            .with_context(|| format!("machine {node} did not die as it should"))?;
        if after.process != before.process {
            bail!("machine {node} was started again during the crash");
        }
        Ok(at_ms)
    }

    /// Cuts a machine's power at once, without asking it anything before. False if it was dead already.
    ///
    /// # Errors
    /// If it does not die.
    pub fn cut_power(&self, node: NodeName) -> Result<bool> {
        if self.machine(node)?.ended.is_some() {
            return Ok(false);
        }
        match self.done(&Request::Kill { node }) {
            Ok(_) => Ok(true),
            // Somebody else may have been quicker.
            Err(error) => match self.machine(node)?.ended {
                Some(_) => Ok(false),
                None => Err(error),
            },
        }
    }

    /// Waits until a machine that dies of itself is dead.
    ///
    /// # Errors
    /// If it does not die.
    pub fn await_death(&self, node: NodeName) -> Result<()> {
        let timeout_s = DEATH_LIMIT_S;
        self.done(&Request::WaitDead { node, timeout_s }).map(drop)
    }

    fn bring_about(&self, node: NodeName, kind: CrashKind) -> Result<()> {
        let letter = match kind {
            CrashKind::Kill => return self.done(&Request::Kill { node }).map(drop),
            CrashKind::SysrqC => 'c',
            CrashKind::SysrqB => 'b',
        };
        let command = format!("echo {letter} >/proc/sysrq-trigger");
        match self.exec(node, &command, Duration::from_secs(30)) {
            Ok(output) => bail!("sysrq {letter} returned on {node}: {output:?}"),
            Err(_) => Ok(()),
        }
    }

    /// Starts a dead machine again, with its disks as they are, and its agent if `with_agent`.
    ///
    /// # Errors
    /// If it lives, or does not come up.
    pub fn boot(&self, node: NodeName, with_agent: bool) -> Result<()> {
        self.done(&Request::Boot { node })?;
        self.wait_ready(node)?;
        if with_agent && self.options()?.service == Service::Agents {
            self.agent(node, AgentAction::Start)?;
        }
        Ok(())
    }

    /// Waits until a started machine takes commands. A machine that the emulator broke on its way up
    /// is started again, since that tells nothing of what is tested: emulated processors may run into
    /// a breakpoint that the kernel has already taken back from its own code, or fault in the middle of
    /// its being patched, which no real one does; a timer's interrupt may get lost, and the kernel waits
    /// for what never wakes, also before it has a console to say so; and on a busy host the kernel may take
    /// its processor's clock for many times slower than it is, so that its seconds fly.
    pub(super) fn wait_ready(&self, node: NodeName) -> Result<()> {
        for _ in 1..BOOTS_MAX {
            match self.wait_once(node) {
                Err(_) if self.has_lost_its_timer(node) => {
                    progress::note(&format!(
                        "a timer of {node} was lost on its way up: booting again"
                    ));
                    self.end(node)?;
                }
                Err(_) if self.hangs_before_its_first_process(&self.machine(node)?) => {
                    progress::note(&format!(
                        "{node}'s kernel did not come to its first process in {} s (at {}): booting again",
                        START_LIMIT.as_secs(),
                        self.instructions(node)
                    ));
                    self.end(node)?;
                }
                Err(error) => {
                    let fault = self.emulators_fault_on(node)?;
                    let Some(fault) = fault.filter(|_| self.is_dead(node)) else {
                        return Err(error);
                    };
                    let said = tail(&self.qemu_log(node), 2);
                    progress::note(&format!("{fault}: booting {node} again; QEMU said: {said}"));
                }
                Ok(()) if self.is_clock_too_fast(node)? => {
                    progress::note(&format!(
                        "{node}'s kernel misjudged its clock, whose seconds fly: booting again"
                    ));
                    self.end(node)?;
                }
                result => return result,
            }
            self.done(&Request::Boot { node })?;
        }
        self.wait_once(node)?;
        if self.is_clock_too_fast(node)? {
            bail!(
                "machine {node} misjudged its clock at each of {BOOTS_MAX} boots: this host is too busy \
                 to emulate it; try again when it has less to do"
            );
        }
        Ok(())
    }

    fn end(&self, node: NodeName) -> Result<()> {
        self.done(&Request::Kill { node })?;
        self.await_death(node)
    }

    /// Whether a machine that is not ready yet, and lives, waits for a timer's interrupt that never came.
    fn has_lost_its_timer(&self, node: NodeName) -> bool {
        let console = fs::read(self.console_log(node)).unwrap_or_default();
        lost_its_timer(&String::from_utf8_lossy(&console))
            && !self.is_dead(node)
            && !self.share(node).join("ready").exists()
    }

    /// Whether a machine lives and its kernel has started nothing yet, for longer than it can take.
    fn hangs_before_its_first_process(&self, machine: &MachineStatus) -> bool {
        let console = fs::read(self.console_log(machine.node)).unwrap_or_default();
        let exists_ms = super::clock::now_ms() - machine.started_at_ms;
        machine.ended.is_none() && never_started(&String::from_utf8_lossy(&console), exists_ms)
    }

    /// Where its processors are.
    fn instructions(&self, node: NodeName) -> String {
        match self.monitor(node, "info registers -a") {
            Ok(said) => {
                let words = said.split_whitespace();
                let places: Vec<&str> = words.filter(|word| word.starts_with("RIP=")).collect();
                places.join(", ")
            }
            Err(error) => format!("unknown: {error:#}"),
        }
    }

    /// Whether a machine that is ready has been up for longer than it exists.
    fn is_clock_too_fast(&self, node: NodeName) -> Result<bool> {
        let ready = self.share(node).join("ready");
        let text = fs::read_to_string(&ready)
            .with_context(|| format!("cannot read {}", ready.display()))?;
        let up_s: f64 = (text.trim().parse())
            .with_context(|| format!("{} is no uptime: {text:?}", ready.display()))?;
        let exists_ms = super::clock::now_ms() - self.machine(node)?.started_at_ms;
        Ok(flies(up_s, exists_ms))
    }

    /// What the emulator, and nothing that is tested, did to one of the machines, if it did and the lab is up.
    #[must_use]
    pub fn emulators_fault(&self) -> Option<String> {
        NodeName::ALL
            .into_iter()
            .find_map(|node| self.emulators_fault_on(node).ok().flatten())
    }

    fn emulators_fault_on(&self, node: NodeName) -> Result<Option<String>> {
        let console = fs::read(self.console_log(node)).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let ended = self.machine(node)?.ended;
        Ok(emulators_fault(node, ended.as_ref(), &text))
    }

    fn is_dead(&self, node: NodeName) -> bool {
        self.machine(node)
            .is_ok_and(|machine| machine.ended.is_some())
    }

    fn wait_once(&self, node: NodeName) -> Result<()> {
        let ready = self.share(node).join("ready");
        let deadline = Instant::now() + READY_LIMIT;
        while !ready.exists() {
            let machine = self.machine(node)?;
            let is_late = Instant::now() >= deadline;
            let hangs =
                self.has_lost_its_timer(node) || self.hangs_before_its_first_process(&machine);
            let ended = machine.ended;
            if ended.is_some() || is_late || hangs {
                let why = match ended {
                    Some(end) => format!("ended while booting ({})", end.how),
                    None if is_late => "is not ready in time".to_owned(),
                    None => "does not come up".to_owned(),
                };
                let qemu = tail(&self.qemu_log(node), 5);
                let console = tail(&self.console_log(node), 20);
                bail!("machine {node} {why}\nqemu: {qemu}\nconsole:\n{console}");
            }
            std::thread::sleep(Duration::from_millis(40));
        }
        if let Ok(problem) = fs::read_to_string(self.share(node).join("problem")) {
            bail!("machine {node} is up but incomplete: {}", problem.trim());
        }
        Ok(())
    }

    /// Cuts the wire between the machines, as if the cable were pulled on both sides. Gives the
    /// host's time, milliseconds since 1970.
    ///
    /// # Errors
    /// If no machine lives.
    pub fn cut_link(&self) -> Result<i64> {
        self.set_link("off")
    }

    /// Mends the wire.
    ///
    /// # Errors
    /// If no machine lives.
    pub fn heal_link(&self) -> Result<i64> {
        self.set_link("on")
    }

    fn set_link(&self, state: &str) -> Result<i64> {
        let mut reached = false;
        for machine in self
            .machines()?
            .iter()
            .filter(|machine| machine.ended.is_none())
        {
            let said = self.monitor(machine.node, &format!("set_link n0 {state}"))?;
            if !said.is_empty() {
                bail!(
                    "QEMU does not set the link of {} {state}: {said}",
                    machine.node
                );
            }
            reached = true;
        }
        if !reached {
            bail!("both machines are dead: there is no link");
        }
        Ok(super::clock::now_ms())
    }

    /// Says something to QEMU's monitor and gives its answer.
    ///
    /// # Errors
    /// If the machine is dead.
    pub fn monitor(&self, node: NodeName, command: &str) -> Result<String> {
        match self.request(&Request::Monitor {
            node,
            command: command.to_owned(),
        })? {
            Reply::Said { text } => Ok(text),
            other => bail!("the daemon answered {other:?}"),
        }
    }

    /// From now on a flush of the shared disks takes at least this long. Only where they are served.
    ///
    /// # Errors
    /// If they are not.
    pub fn flush_takes(&self, flush_us: u64) -> Result<()> {
        self.request(&Request::FlushTakes { flush_us }).map(drop)
    }
}

/// What the emulator did wrong, if the way a machine ended or its kernel's console tells of that.
fn emulators_fault(node: NodeName, end: Option<&MachineEnd>, console: &str) -> Option<String> {
    let fell = end.filter(|end| !end.killed && EMULATOR_ENDS.contains(&end.how.as_str()));
    if let Some(end) = fell {
        return Some(format!("{node}'s emulator fell over ({})", end.how));
    }
    let broke = EMULATOR_OOPSES.iter().any(|oops| console.contains(oops));
    broke.then(|| format!("the emulator broke {node}'s kernel while that patched its code"))
}

/// Whether a kernel found that a processor slept through its timer.
fn lost_its_timer(console: &str) -> bool {
    console.contains(LOST_TIMER)
}

/// Whether a kernel of this age has not come to its first process, and will not.
fn never_started(console: &str, exists_ms: i64) -> bool {
    let is_late = u128::try_from(exists_ms).is_ok_and(|ms| ms >= START_LIMIT.as_millis());
    is_late && !console.contains(STARTED)
}

/// Whether this uptime is impossible for a machine of this age; its clock may be a little off.
fn flies(up_s: f64, exists_ms: i64) -> bool {
    up_s * 1000.0 > exists_ms as f64 * 1.2 + 1000.0
}

/// Each way to die leaves its own evidence; a machine that died of another cause must not pass.
fn judge(machine: &MachineStatus, kind: CrashKind, console: &str) -> Result<i64> {
    let end = machine.ended.as_ref().context("it lives")?;
    let own_death = console.contains("sysrq: ") || console.contains("Kernel panic");
    let fits = match kind {
        CrashKind::Kill => end.killed && end.how == "signal 9" && !own_death,
        CrashKind::SysrqC => !end.killed && console.contains("sysrq: Trigger a crash"),
        CrashKind::SysrqB => !end.killed && console.contains("sysrq: Resetting"),
    };
    if !fits {
        let shown = console.lines().rev().take(5).collect::<Vec<_>>();
        bail!(
            "it ended by {} (killed: {}); console, last first: {shown:?}",
            end.how,
            end.killed
        );
    }
    Ok(end.at_ms)
}

#[cfg(test)]
mod tests {
    use super::{CrashKind, emulators_fault, flies, judge, lost_its_timer, never_started};
    use crate::lab::config::NodeName;
    use crate::lab::process::ProcessId;
    use crate::lab::protocol::{MachineEnd, MachineStatus};

    #[test]
    fn a_machine_cannot_be_up_for_longer_than_it_exists() {
        assert!(!flies(2.8, 3_400));
        assert!(!flies(31.0, 33_000));
        assert!(!flies(33.5, 33_000), "a clock may be a little off");
        assert!(flies(353.4, 24_000));
        assert!(flies(8.0, 4_000));
    }

    fn end(how: &str, killed: bool) -> MachineEnd {
        MachineEnd {
            at_ms: 7,
            how: how.to_owned(),
            killed,
        }
    }

    #[test]
    fn only_a_kernel_that_died_patching_itself_is_the_emulators() {
        let fault = |console| emulators_fault(NodeName::A, None, console);
        assert!(fault("[    2.1] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI").is_some());
        let patching = "Oops: general protection fault, maybe for address 0x10: 0000 [#1]\n\
                        RIP: 0010:text_poke_early+0x68/0xa0";
        assert!(fault(patching).is_some());
        let other = "Oops: general protection fault\nRIP: 0010:rxe_completer+0x12/0x900";
        assert!(fault(other).is_none());
    }

    #[test]
    fn a_processor_that_slept_through_its_timer_is_known_from_a_busy_one() {
        let starved = "rcu: rcu_preempt kthread starved for 5252 jiffies! g-1151 f0x0";
        assert!(!lost_its_timer(starved));
        let lost = "rcu: rcu_preempt kthread timer wakeup didn't happen for 5251 jiffies! g-1151";
        assert!(lost_its_timer(&format!("{starved}\n{lost}")));
    }

    #[test]
    fn a_kernel_that_hangs_before_its_first_process_is_known_from_a_later_hang() {
        assert!(never_started("", 90_000));
        assert!(!never_started("", 60_000));
        assert!(!never_started("LABSTART\n", 170_000));
    }

    #[test]
    fn only_an_emulator_that_fell_over_itself_is_at_fault_whatever_the_guest_said() {
        let fault = |how, killed| emulators_fault(NodeName::A, Some(&end(how, killed)), "");
        assert!(fault("signal 11", false).is_some());
        assert!(fault("signal 9", false).is_none(), "somebody killed it");
        assert!(fault("signal 9", true).is_none());
        assert!(fault("exit status 1", false).is_none(), "it says why");
    }

    fn ended(how: &str, killed: bool) -> MachineStatus {
        MachineStatus {
            node: NodeName::A,
            process: ProcessId {
                pid: 1,
                start_ticks: 1,
            },
            boots: 1,
            started_at_ms: 0,
            ended: Some(end(how, killed)),
        }
    }

    #[test]
    fn each_crash_is_known_by_its_own_evidence() {
        let panic = "sysrq: Trigger a crash\nKernel panic - not syncing: sysrq triggered crash";
        let killed = ended("signal 9", true);
        let exited = ended("exit status 0", false);
        assert_eq!(judge(&killed, CrashKind::Kill, "").ok(), Some(7));
        assert_eq!(judge(&exited, CrashKind::SysrqC, panic).ok(), Some(7));
        assert_eq!(
            judge(&exited, CrashKind::SysrqB, "sysrq: Resetting").ok(),
            Some(7)
        );
    }

    #[test]
    fn another_death_does_not_pass() {
        let killed = ended("signal 9", true);
        let exited = ended("exit status 0", false);
        assert!(judge(&killed, CrashKind::Kill, "Kernel panic - not syncing").is_err());
        assert!(judge(&exited, CrashKind::Kill, "").is_err());
        assert!(
            judge(
                &exited,
                CrashKind::SysrqC,
                "Kernel panic - not syncing: Oops"
            )
            .is_err()
        );
        assert!(judge(&killed, CrashKind::SysrqB, "sysrq: Resetting").is_err());
        let alive = MachineStatus {
            ended: None,
            ..exited
        };
        assert!(judge(&alive, CrashKind::Kill, "").is_err());
    }
}
