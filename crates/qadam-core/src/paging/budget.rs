//! How much paged state may stay in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::mapped::{self, Arena};
use crate::error::{Error, Result};

/// What all arenas together may keep in memory while a step runs, and how the step goes through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Everything may stay: nothing is written out or let go.
    pub keeps_all: bool,
    /// How many bytes of a step's state stay in memory nevertheless: those that come first.
    pub keep: usize,
    /// How many bytes of state are worked on at a time.
    pub window: usize,
}

/// A window where memory is plentiful: large enough to hide the hand-over between threads, small
/// enough that the first one is soon there.
const WINDOW: usize = 32 << 20;
/// A window is at least so large.
const LEAST: usize = 64 << 10;
/// Windows that are in memory at a time, at most: read ahead, worked on, being written.
const IN_FLIGHT: usize = 8;

/// So little state stays in memory without a look at how much there is: the look would take longer
/// than the step.
const SMALL: u64 = 64 << 20;

/// Decides for a step, as memory is now; `arenas` are those of the step.
pub(super) fn plan(arenas: &[&Arena]) -> Plan {
    let all = mapped::all();
    let total = all.iter().map(|arena| arena.bytes() as u64).sum();
    let limits = all.iter().map(AsRef::as_ref).chain(arenas.iter().copied());
    let budget = limits.filter_map(Arena::limit).min().unwrap_or_else(|| {
        if total <= SMALL { SMALL } else { available().unwrap_or(u64::MAX) / 4 * 3 }
    });
    let own: BTreeMap<usize, usize> =
        arenas.iter().map(|arena| (arena.address(), arena.bytes())).collect();
    decide(own.into_values().map(|bytes| bytes as u64).sum(), total, budget)
}

/// For a step through `own` bytes of the `total`.
fn decide(own: u64, total: u64, budget: u64) -> Plan {
    if total <= budget {
        return Plan { keeps_all: true, keep: usize::MAX, window: WINDOW };
    }
    let budget = usize::try_from(budget).unwrap_or(usize::MAX);
    let window = (budget / (2 * IN_FLIGHT)).clamp(LEAST, WINDOW);
    // other optimizers keep theirs: each has its share
    let share = own.min(total) as f64 / total as f64;
    Plan { keeps_all: false, keep: ((budget / 2) as f64 * share) as usize, window }
}

/// `QADAM_PAGE_MEMORY`: how many bytes of paged state may stay in memory, if it is set.
pub(super) fn limit() -> Result<Option<u64>> {
    let Some(value) = std::env::var_os("QADAM_PAGE_MEMORY").filter(|value| !value.is_empty())
    else {
        return Ok(None);
    };
    let value = value.to_string_lossy().into_owned();
    value.parse().map(Some).map_err(|_| Error::PageMemory { value })
}

/// Bytes of memory that this process could still take, page cache given up, where the system says.
fn available() -> Option<u64> {
    let system = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")? * 1024;
    Some(system.min(in_cgroup().unwrap_or(u64::MAX)))
}

/// What the memory controllers of control groups leave.
fn in_cgroup() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().filter_map(|line| left_in(line, Path::new("/sys/fs/cgroup"))).min()
}

/// What the group of a line of `/proc/self/cgroup`, and those that it is in, leave.
fn left_in(line: &str, root: &Path) -> Option<u64> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let path = path.trim_start_matches('/');
    if controllers.split(',').any(|name| name == "memory") {
        return version_1(&root.join("memory").join(path))
            .or_else(|| version_1(&root.join("memory"))); // a container sees its own as the root
    }
    if !controllers.is_empty() {
        return None;
    }
    let root: PathBuf = root.into();
    let group = root.join(path);
    group.ancestors().take_while(|group| group.starts_with(&root)).filter_map(version_2).min()
}

fn version_1(group: &Path) -> Option<u64> {
    let stat = fs::read_to_string(group.join("memory.stat")).ok()?;
    let used = number(&group.join("memory.usage_in_bytes"))?;
    let limit = field(&stat, "hierarchical_memory_limit")?;
    let cache = field(&stat, "total_active_file")? + field(&stat, "total_inactive_file")?;
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

fn version_2(group: &Path) -> Option<u64> {
    // "max" is no number and no limit; beyond "high" a process is slowed down
    let limits = ["memory.max", "memory.high"].map(|name| number(&group.join(name)));
    let limit = limits.into_iter().flatten().min()?;
    let used = number(&group.join("memory.current"))?;
    let stat = fs::read_to_string(group.join("memory.stat")).ok()?;
    let cache = field(&stat, "active_file")? + field(&stat, "inactive_file")?;
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number after `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_stays_and_what_does_not_goes_through_in_windows() {
        assert!(decide(1 << 29, 1 << 30, 1 << 30).keeps_all);
        let plan = decide(1 << 31, 1 << 31, 1 << 30);
        assert_eq!(plan, Plan { keeps_all: false, keep: 1 << 29, window: WINDOW });
        assert_eq!(decide(1 << 29, 1 << 31, 1 << 30).keep, 1 << 27);
        assert!(plan.keep + IN_FLIGHT * plan.window <= 1 << 30);
        assert_eq!(decide(1 << 20, 1 << 20, 0), Plan { keeps_all: false, keep: 0, window: LEAST });
    }

    #[test]
    fn control_groups_of_both_versions_are_read() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("memory/a/memory.usage_in_bytes", "700\n");
        let stat = "cache 9\nhierarchical_memory_limit 1000\ntotal_inactive_file 100\n\
                    total_active_file 50\n";
        write("memory/a/memory.stat", stat);
        assert_eq!(left_in("4:memory:/a", root.path()), Some(450));
        assert_eq!(left_in("5:cpu,cpuacct:/a", root.path()), None);

        let group = |path: &str, max: &str, current: &str| {
            write(&format!("{path}/memory.max"), max);
            write(&format!("{path}/memory.current"), current);
            write(&format!("{path}/memory.stat"), "anon 1\nactive_file 30\ninactive_file 20\n");
        };
        group("b", "500\n", "400\n");
        group("b/c", "max\n", "100\n");
        assert_eq!(left_in("0::/b/c", root.path()), Some(150));
        write("b/c/memory.high", "110\n");
        assert_eq!(left_in("0::/b/c", root.path()), Some(60));
        write("b/c/memory.high", "max\n");
        group("b/c", "120\n", "100\n");
        assert_eq!(left_in("0::/b/c", root.path()), Some(70));
        assert_eq!(left_in("0::/", root.path()), None);
    }

    #[test]
    fn this_machine_says_something() {
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }
}
