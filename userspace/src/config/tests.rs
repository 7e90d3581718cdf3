use std::path::Path;

use super::*;

const EXAMPLE: &str = include_str!("../../../docs/twinwrite.toml");

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/twinwrite/twinwrite.toml"), text)
}

/// The error of the example after one replacement, which must hit.
fn error_with(from: &str, to: &str) -> String {
    assert!(EXAMPLE.contains(from), "the example has no `{from}`");
    let text = EXAMPLE.replacen(from, to, 1);
    let checked = parse(&text).and_then(|config| config.validate(&NodeId("a".into())));
    checked
        .expect_err("the configuration should be refused")
        .to_string()
}

#[test]
fn the_example_is_valid_and_needs_no_warning() {
    let config = parse(EXAMPLE).unwrap();
    assert_eq!(
        config.validate(&NodeId("b".into())).unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(config.nodes.len(), 2);
    assert_eq!(config.digest.len(), 8);
}

#[test]
fn a_directory_that_is_not_below_the_mount_point_is_refused() {
    let with = |directory: &str| {
        let line = format!("mount_point = \"/srv/data\"\ndirectory = \"{directory}\"");
        error_with("mount_point = \"/srv/data\"", &line)
    };
    for wrong in [
        "",
        "/srv/data/projects",
        "../projects",
        "a/../../b",
        ".",
        ".twinwrite",
        ".twinwrite/x",
    ] {
        let told = with(wrong);
        assert!(
            told.contains("volume.directory of `data`"),
            "{wrong}: {told}"
        );
        assert!(told.contains("below the mount point"), "{wrong}: {told}");
    }
}

#[test]
fn the_example_shows_every_default_as_it_is() {
    // Uncommented, the optional keys must parse and, where the text promises the default, be it.
    let uncommented: String = EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| is_key(key)) => rest,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n");
    let shown = parse(&uncommented).unwrap();
    let plain = parse(EXAMPLE).unwrap();
    assert_eq!(shown.cluster.rdma_device.as_deref(), Some("rxe0"));
    assert_eq!(shown.volumes[0].mount_options, "noatime");
    assert_eq!(
        shown.volumes[0].serve_command.as_ref().map(Vec::len),
        Some(3)
    );
    assert!(shown.cluster.volume_io_limit.is_some());
    assert_eq!(
        shown.volumes[0].directory.as_deref(),
        Some(Path::new("projects"))
    );
    let rest = |mut config: Config| {
        config.digest.clear();
        config.cluster.rdma_device = None;
        config.cluster.volume_io_limit = None;
        config.volumes[0].mount_options.clear();
        config.volumes[0].directory = None;
        config.volumes[0].serve_command = None;
        format!("{config:?}")
    };
    assert_eq!(rest(shown), rest(plain));
}

fn is_key(word: &str) -> bool {
    !word.is_empty()
        && word
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[test]
fn an_unknown_key_is_told_with_its_line_and_the_nearest_valid_one() {
    let text = EXAMPLE.replacen("filesystem = ", "file_system = ", 1);
    let line = 1 + text
        .lines()
        .position(|line| line.starts_with("file_system"))
        .unwrap();
    let error = parse(&text).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "/etc/twinwrite/twinwrite.toml:{line}: unknown key `file_system`; the nearest valid \
             one is `filesystem`"
        )
    );
    let error = error_with("[cluster]", "[cluster]\nheartbeat_intervall = \"1s\"");
    assert!(error.contains("`heartbeat_interval`"), "{error}");
    let error = error_with("[cluster]", "[[volumes]]\n[cluster]");
    assert!(
        error.contains("unknown key `volumes`; the nearest valid one is `volume`"),
        "{error}"
    );
}

#[test]
fn other_mistakes_in_the_file_are_told_with_their_line() {
    assert!(error_with("owner = \"a\"\n", "").contains("missing field `owner`"));
    let error = error_with("[cluster]", "[cluster");
    assert!(
        error.starts_with("/etc/twinwrite/twinwrite.toml:8: "),
        "{error}"
    );
    let error = error_with("#dead_after = \"3s\"", "dead_after = \"soon\"");
    assert!(
        error.starts_with("/etc/twinwrite/twinwrite.toml:"),
        "{error}"
    );
}

#[test]
fn each_rule_is_told_with_key_and_remedy() {
    let cases = [
        (
            "name = \"office\"",
            "name = \"my office\"",
            "cluster.name",
            "letters",
        ),
        (
            "mailbox = \"/dev",
            "mailbox = \"dev",
            "cluster.mailbox",
            "absolute",
        ),
        (
            "#dead_after = \"3s\"",
            "dead_after = \"2s\"",
            "cluster.dead_after",
            "at least 3s",
        ),
        (
            "#volume_io_limit = \"60s\"",
            "volume_io_limit = \"5s\"",
            "cluster.volume_io_limit",
            "at least 10s",
        ),
        (
            "#heartbeat_interval = \"500ms\"",
            "heartbeat_interval = \"1s\"",
            "cluster.dead_after",
            "4s",
        ),
        (
            "#heartbeat_interval = \"500ms\"",
            "heartbeat_interval = \"0s\"",
            "cluster.heartbeat_interval",
            "above zero",
        ),
        (
            "#fence_timeout = \"30s\"",
            "fence_timeout = \"-1s\"",
            "cluster.fence_timeout",
            "above zero",
        ),
        (
            "[\"/usr/local/sbin/fence-node\", \"--off\", \"{node}\"]",
            "[]",
            "cluster.fence_command",
            "absolute path",
        ),
        ("name = \"b\"", "name = \"a\"", "node.name", "twice"),
        ("192.0.2.2", "0.0.0.0", "node.address", "reaches it"),
        ("owner = \"a\"", "owner = \"c\"", "volume.owner", "`a`, `b`"),
        (
            "mirror = \"b\"",
            "mirror = \"a\"",
            "volume.mirror",
            "another machine",
        ),
        (
            "#region_bytes = \"256MiB\"",
            "region_bytes = \"4MB\"",
            "volume.region_bytes",
            "at least 4.0 MiB",
        ),
        (
            "#region_bytes = \"256MiB\"",
            "region_bytes = 4194305",
            "volume.region_bytes",
            "4198400",
        ),
        (
            "#ring_bytes = \"16MiB\"",
            "ring_bytes = \"16MB\"",
            "volume.ring_bytes",
            "power of two",
        ),
        (
            "#ring_bytes = \"16MiB\"",
            "ring_bytes = \"512KiB\"",
            "volume.ring_bytes",
            "1 MiB",
        ),
        (
            "#lag_limit = \"2s\"",
            "lag_limit = \"0s\"",
            "volume.lag_limit",
            "above zero",
        ),
        (
            "filesystem = \"ext4\"",
            "filesystem = \"ext3\"",
            "volume.filesystem",
            "ext4, xfs or btrfs",
        ),
        (
            "\"/dev/disk/by-id/virtio-data\"",
            "\"/dev/disk/by-id/virtio-mailbox\"",
            "volume.device",
            "of its own",
        ),
        (
            "mount_point = \"/srv/data\"",
            "mount_point = \"/\"",
            "volume.mount_point",
            "root",
        ),
        (
            "#mount_options = \"noatime\"",
            "mount_options = \"noatime,norecovery\"",
            "volume.mount_options",
            "remove it",
        ),
        (
            "#mount_options = \"noatime\"",
            "mount_options = \"subvol=home\"",
            "volume.mount_options",
            "subvolid=5",
        ),
        (
            "#mount_options = \"noatime\"",
            "mount_options = \"nobarrier\"",
            "volume.mount_options",
            "allow_no_barriers",
        ),
    ];
    for (from, to, key, remedy) in cases {
        let error = error_with(from, to);
        assert!(
            error.contains(key) && error.contains(remedy),
            "{to}: {error}"
        );
    }
}

#[test]
fn barriers_may_be_off_where_the_configuration_says_so_in_words() {
    let text = EXAMPLE.replace(
        "#mount_options = \"noatime\"",
        "mount_options = \"nobarrier\"\nallow_no_barriers = true",
    );
    parse(&text).unwrap().validate(&NodeId("a".into())).unwrap();
}

#[test]
fn all_findings_are_told_at_once() {
    let error = error_with(
        "name = \"office\"",
        "name = \"\"\nheartbeat_interval = \"0s\"",
    );
    assert!(
        error.contains("cluster.name") && error.contains("heartbeat_interval"),
        "{error}"
    );
}

#[test]
fn two_nodes_are_required() {
    let third = "[[node]]\nname = \"c\"\naddress = \"192.0.2.3:7900\"\n\n[[volume]]";
    assert!(error_with("[[volume]]", third).contains("there are 3"));
}

#[test]
fn weak_protection_is_a_warning() {
    let start = EXAMPLE.find("fence_command = ").unwrap();
    let text = format!("{}#{}", &EXAMPLE[..start], &EXAMPLE[start..]);
    let text = text.replace(
        "#metrics_listen = \"127.0.0.1",
        "metrics_listen = \"0.0.0.0",
    );
    let warnings = parse(&text).unwrap().validate(&NodeId("a".into())).unwrap();
    assert!(warnings[0].contains("waits for a person"), "{warnings:?}");
    assert!(warnings[1].contains("metrics_listen"), "{warnings:?}");
    assert_eq!(warnings.len(), 2);
}

#[test]
fn this_node_is_the_flag_or_the_host_name_and_one_of_the_nodes() {
    let config = parse(EXAMPLE).unwrap();
    assert_eq!(config.this_node(None, "a").unwrap(), NodeId("a".into()));
    assert_eq!(
        config.this_node(None, "b.example.org").unwrap(),
        NodeId("b".into())
    );
    assert_eq!(
        config.this_node(Some("b"), "a").unwrap(),
        NodeId("b".into())
    );
    let error = config.this_node(None, "laptop").unwrap_err().to_string();
    assert!(error.contains("`laptop`") && error.contains("`a`, `b`") && error.contains("--node"));
    assert!(config.validate(&NodeId("laptop".into())).is_err());
}

#[test]
fn a_missing_file_is_told() {
    let error = Config::load(Path::new("/nonexistent/twinwrite.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nonexistent/twinwrite.toml") && error.contains("--config"),
        "{error}"
    );
}
