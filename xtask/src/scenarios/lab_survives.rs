//! The lab itself: everything other scenarios rely on, each part with what would happen if it lied.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::with_lab;
use crate::lab::process::{self, ProcessId};
use crate::lab::{CrashKind, Lab, NodeName, Options, Programs, Service};

use NodeName::{A, B};

const SHORT: Duration = Duration::from_secs(60);

fn options() -> Options {
    Options {
        service: Service::Nothing,
        programs: Programs::AsBuilt,
        ..Options::default()
    }
}

pub(super) fn run() -> Result<()> {
    with_lab("lab_survives", options(), |lab| {
        commands(lab)?;
        files(lab)?;
        crashes(lab)?;
        fence(lab)?;
        lab.boot(A, false)?;
        with_lab("lab_survives_beside", options(), |beside| {
            link(lab, beside)?;
            daemon_killed(beside)
        })?;
        ensure!(
            lab.run(A, "hostname")? == "a",
            "the other lab's end reached this one"
        );
        let machines = lab.machines()?;
        lab.down()?;
        for machine in machines {
            ensure!(
                !machine.process.is_alive(),
                "machine {} outlived its lab",
                machine.node
            );
        }
        nobody_left(lab)
    })?;
    with_lab("lab_survives_directory", options(), directory_removed)
}

fn commands(lab: &Lab) -> Result<()> {
    let output = lab.exec(A, "echo out; echo err >&2; exit 7", SHORT)?;
    ensure!(
        output.status == 7 && output.text() == "out",
        "exec gave {output:?}"
    );
    ensure!(
        output.stderr == b"err\n",
        "exec mixed the outputs: {output:?}"
    );
    let limited = lab.exec(A, "sleep 30", Duration::from_secs(1))?;
    ensure!(limited.status == 124, "a limit is not kept: {limited:?}");
    let large = lab.run(A, "head -c 1048576 /dev/zero | tr '\\0' x")?;
    ensure!(
        large.len() == 1 << 20,
        "of 1 MiB of output {} bytes came",
        large.len()
    );
    // Each of them waits for all others, which only commands that run side by side can.
    thread::scope(|scope| {
        let meet = "cd /tmp/meet && touch $0 && while [ $(ls | wc -l) -lt 12 ]; do sleep 0.1; done; echo $0";
        let run = |number: u32| move || lab.run(B, &format!("sh -c '{meet}' {number}"));
        lab.run(B, "mkdir /tmp/meet")?;
        let runs: Vec<_> = (0..12)
            .map(|number| (number, scope.spawn(run(number))))
            .collect();
        for (number, run) in runs {
            let said = run
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            ensure!(
                said == number.to_string(),
                "command {number} got the answer {said}"
            );
        }
        anyhow::Ok(())
    })?;
    Ok(())
}

fn files(lab: &Lab) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (there, back) = (
        directory.path().join("there"),
        directory.path().join("back"),
    );
    let bytes: Vec<u8> = (0..300_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(&there, &bytes)?;
    lab.put(A, &there, "/tmp/a name with spaces")?;
    lab.get(A, "/tmp/a name with spaces", &back)?;
    ensure!(fs::read(&back)? == bytes, "a file came back changed");
    ensure!(
        lab.get(A, "/no/such/file", &back).is_err(),
        "a missing file was fetched"
    );
    Ok(())
}

fn crashes(lab: &Lab) -> Result<()> {
    for kind in [CrashKind::SysrqC, CrashKind::SysrqB, CrashKind::Kill] {
        let mark = format!("{kind:?}");
        lab.run(
            A,
            &format!("echo {mark} >/var/lib/twinwrite/mark; sync; echo x >/tmp/volatile"),
        )?;
        let process = lab.machine(A)?.process;
        lab.crash(A, kind)?;
        ensure!(!process.is_alive(), "{kind:?}: the machine lives");
        ensure!(
            lab.exec(A, "true", SHORT).is_err(),
            "{kind:?}: a dead machine took a command"
        );
        ensure!(
            lab.crash(A, kind).is_err(),
            "{kind:?}: a dead machine was crashed again"
        );
        lab.boot(A, false)?;
        ensure!(
            lab.boot(A, false).is_err(),
            "a running machine was started again"
        );
        let kept = lab.run(A, "cat /var/lib/twinwrite/mark; ls /tmp")?;
        ensure!(
            kept == mark,
            "after {kind:?} the local disk or memory is wrong: {kept}"
        );
        ensure!(
            reaches(lab, A, B)?,
            "after {kind:?} and a boot there is no link"
        );
        rdma_is_there(lab, A)?;
    }
    Ok(())
}

fn rdma_is_there(lab: &Lab, node: NodeName) -> Result<()> {
    let link = lab.run(node, "rdma link show rxe0/1")?;
    ensure!(
        link.contains("state ACTIVE"),
        "rxe0 of {node} is not active: {link}"
    );
    Ok(())
}

fn fence(lab: &Lab) -> Result<()> {
    let process = lab.machine(A)?.process;
    lab.run(B, "twinwrite-fence a")?;
    ensure!(
        !process.is_alive(),
        "the fence answered before the machine was gone"
    );
    lab.run(B, "twinwrite-fence a")
        .context("a dead machine counts as fenced")?;
    let unknown = lab.exec(B, "twinwrite-fence nobody", SHORT)?;
    ensure!(
        unknown.status == 1,
        "fencing an unknown node gave {unknown:?}"
    );
    let fenced: Vec<_> = lab
        .events()?
        .into_iter()
        .filter(|event| event["event"] == "fenced")
        .collect();
    let [first, second] = fenced.as_slice() else {
        bail!("fence events: {fenced:?}")
    };
    ensure!(
        first["was_alive"] == true && second["was_alive"] == false,
        "{fenced:?}"
    );
    Ok(())
}

/// The cut is seen in the lab it was made in and in no other.
fn link(lab: &Lab, beside: &Lab) -> Result<()> {
    ensure!(
        reaches(lab, A, B)? && reaches(beside, A, B)?,
        "there is no link to cut"
    );
    lab.cut_link()?;
    ensure!(
        !reaches(lab, A, B)?,
        "the link was cut and a still reaches b"
    );
    ensure!(
        !reaches(lab, B, A)?,
        "the link was cut and b still reaches a"
    );
    ensure!(reaches(beside, A, B)?, "the cut reached another lab");
    lab.heal_link()?;
    ensure!(
        reaches(lab, A, B)? && reaches(lab, B, A)?,
        "the link was mended and is not there"
    );
    Ok(())
}

fn reaches(lab: &Lab, from: NodeName, to: NodeName) -> Result<bool> {
    let ping = format!("ping -c 5 -i 0.2 -W 2 {}", to.address());
    Ok(lab.exec(from, &ping, SHORT)?.status == 0)
}

/// A daemon that dies takes its machines along, and whoever looks next notices.
fn daemon_killed(lab: &Lab) -> Result<()> {
    let machines = lab.machines()?;
    daemon_of(lab)?.signal(Signal::SIGKILL)?;
    for machine in machines {
        ensure!(
            machine.process.wait_gone(SHORT),
            "machine {} outlived its daemon",
            machine.node
        );
    }
    ensure!(!lab.is_up()?, "a lab without a daemon counts as up");
    ensure!(
        lab.exec(A, "true", SHORT).is_err(),
        "a lab without a daemon took a command"
    );
    nobody_left(lab)
}

/// A lab whose directory is gone ends by itself.
fn directory_removed(lab: &Lab) -> Result<()> {
    let (machines, daemon) = (lab.machines()?, daemon_of(lab)?);
    fs::remove_dir_all(lab.directory())?;
    ensure!(daemon.wait_gone(SHORT), "the daemon outlived its directory");
    for machine in machines {
        ensure!(
            !machine.process.is_alive(),
            "machine {} outlived its lab",
            machine.node
        );
    }
    nobody_left(lab)
}

fn daemon_of(lab: &Lab) -> Result<ProcessId> {
    let registration = fs::read(lab.directory().join("daemon.json"))?;
    let registration: serde_json::Value = serde_json::from_slice(&registration)?;
    Ok(serde_json::from_value(registration["daemon"].clone())?)
}

fn nobody_left(lab: &Lab) -> Result<()> {
    let left = process::working_below(lab.directory())?;
    ensure!(
        left.is_empty(),
        "lab {} left the processes {left:?}",
        lab.name()
    );
    Ok(())
}
