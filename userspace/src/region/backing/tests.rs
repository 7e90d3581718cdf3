use super::*;

const LOG: u64 = LOG_BYTES_MIN;

type Change = fn(&mut RegionIdentity);

fn identity() -> RegionIdentity {
    RegionIdentity {
        cluster: "lab".into(),
        volume: "home".into(),
        owner: "a".into(),
        mirror: "b".into(),
        filesystem_uuid: Some([7; 16]),
    }
}

fn made() -> (tempfile::TempDir, RegionFile) {
    let dir = tempfile::tempdir().unwrap();
    let (region, found) = RegionFile::open_or_create(dir.path(), &identity(), LOG).unwrap();
    assert_eq!(found, Found::Created);
    (dir, region)
}

#[test]
fn a_new_region_is_empty_and_a_second_open_keeps_it() {
    let (dir, region) = made();
    let header = region.verify(&identity()).unwrap();
    assert_eq!(
        (header.state, header.epoch, header.log_bytes),
        (region_state::EMPTY, 0, LOG)
    );
    region
        .memory()
        .write_at(LOG_OFFSET + LOG - 5, b"kept!")
        .unwrap();
    drop(region);
    let (region, found) = RegionFile::open_or_create(dir.path(), &identity(), LOG).unwrap();
    assert_eq!(found, Found::Kept);
    let mut bytes = [0; 5];
    region.read_at(LOG_OFFSET + LOG - 5, &mut bytes).unwrap();
    assert_eq!(&bytes, b"kept!");
    assert!(region.read_at(LOG_OFFSET + LOG - 4, &mut bytes).is_err());
    assert!(!dir.path().join("home.region.partial").exists());
}

#[test]
fn another_size_is_refused_and_the_region_left_alone() {
    let (dir, region) = made();
    region.memory().write_at(LOG_OFFSET, b"old").unwrap();
    let error = RegionFile::open_or_create(dir.path(), &identity(), LOG * 2).unwrap_err();
    assert!(
        matches!(error, BackingError::Memory(MemoryError::WrongSize { .. })),
        "{error}"
    );
    let mut bytes = [0; 3];
    region.read_at(LOG_OFFSET, &mut bytes).unwrap();
    assert_eq!(&bytes, b"old");
    for bad in [0, LOG - 4096, LOG + 1, LOG_BYTES_MAX + 4096, u64::MAX] {
        let error = RegionFile::open_or_create(dir.path(), &identity(), bad).unwrap_err();
        assert!(
            matches!(error, BackingError::LogBytes { .. }),
            "{bad}: {error}"
        );
    }
}

#[test]
fn a_damaged_foreign_or_newer_header_is_told_apart() {
    let (_dir, region) = made();
    let open = identity().header(region_state::OPEN, 3, LOG).unwrap();
    region.write_header(&open).unwrap();
    region.verify(&identity()).unwrap();
    let foreign: [(&str, Change); 5] = [
        ("cluster", |id| id.cluster = "other".into()),
        ("volume", |id| id.volume = "other".into()),
        ("owner", |id| id.owner = "c".into()),
        ("mirror", |id| id.mirror = "c".into()),
        ("file system", |id| id.filesystem_uuid = Some([8; 16])),
    ];
    for (wanted, change) in foreign {
        let mut other = identity();
        change(&mut other);
        match region.verify(&other).unwrap_err() {
            BackingError::Foreign { what, .. } => assert_eq!(what, wanted),
            error => panic!("{error}"),
        }
    }
    region
        .write_header(&RegionHeader { version: 9, ..open })
        .unwrap();
    assert!(matches!(
        region.header(),
        Err(BackingError::Version { found: 9, .. })
    ));
    region
        .write_header(&RegionHeader {
            log_bytes: LOG + 4096,
            ..open
        })
        .unwrap();
    assert!(matches!(
        region.header(),
        Err(BackingError::Truncated { .. })
    ));
    region.write_header(&open).unwrap();
    for offset in 0..size_of::<RegionHeader>() as u64 {
        let mut byte = [0];
        region.read_at(offset, &mut byte).unwrap();
        region.memory().write_at(offset, &[byte[0] ^ 1]).unwrap();
        assert!(
            matches!(region.header(), Err(BackingError::Damaged { .. })),
            "byte {offset}"
        );
        region.memory().write_at(offset, &byte).unwrap();
    }
    region.header().unwrap();
}

#[test]
fn names_that_cannot_be_told_apart_are_refused() {
    for volume in ["", ".", "..", "a/b", "../x", "a\0b", &"v".repeat(64)] {
        let wrong = RegionIdentity {
            volume: volume.into(),
            ..identity()
        };
        let dir = tempfile::tempdir().unwrap();
        let error = RegionFile::open_or_create(dir.path(), &wrong, LOG).unwrap_err();
        assert!(
            matches!(error, BackingError::Name { .. }),
            "{volume:?}: {error}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_saved_region_is_the_same_and_replaces_an_older_one() {
    let (dir, region) = made();
    region
        .write_header(&identity().header(region_state::OPEN, 3, LOG).unwrap())
        .unwrap();
    region
        .memory()
        .write_at(LOG_OFFSET + 3 * CHUNK_BYTES as u64 - 2, b"frame")
        .unwrap();
    let saved = dir.path().join("saved.region");
    fs::write(&saved, b"an older one").unwrap();
    region.save_to(&saved).unwrap();
    let mut wanted = vec![0; (LOG_OFFSET + LOG) as usize];
    region.read_at(0, &mut wanted).unwrap();
    assert!(fs::read(&saved).unwrap() == wanted);
    assert!(!dir.path().join("saved.region.partial").exists());
    let reopened = RegionFile::open(&saved).unwrap();
    assert_eq!(reopened.verify(&identity()).unwrap().epoch, 3);
    assert_eq!(reopened.log_bytes(), LOG);
}

#[test]
fn a_truncated_or_foreign_file_is_an_error_and_stays_as_it_is() {
    let (dir, region) = made();
    let saved = dir.path().join("saved.region");
    region.save_to(&saved).unwrap();
    let whole = fs::read(&saved).unwrap();
    for keep in [1, 311, 4096, 8192, whole.len() - 4096, whole.len() - 1] {
        fs::write(&saved, &whole[..keep]).unwrap();
        assert!(RegionFile::open(&saved).is_err(), "{keep} bytes");
        assert_eq!(fs::read(&saved).unwrap(), &whole[..keep]);
    }
    fs::write(&saved, b"").unwrap();
    assert!(RegionFile::open(&saved).is_err());
    fs::write(&saved, vec![b'x'; whole.len()]).unwrap();
    assert!(matches!(
        RegionFile::open(&saved),
        Err(BackingError::Damaged { .. })
    ));
}

#[test]
fn a_copy_that_fails_leaves_the_older_one() {
    let (dir, region) = made();
    let saved = dir.path().join("saved.region");
    fs::write(&saved, b"an older one").unwrap();
    fs::create_dir(dir.path().join("saved.region.partial")).unwrap();
    assert!(matches!(
        region.save_to(&saved),
        Err(BackingError::File { .. })
    ));
    assert_eq!(fs::read(&saved).unwrap(), b"an older one");
}

#[test]
fn reset_leaves_nothing_of_the_former_epoch() {
    let (_dir, region) = made();
    region.memory().write_at(4096, &[1; 192]).unwrap();
    region
        .memory()
        .write_at(LOG_OFFSET + LOG - 1, &[1])
        .unwrap();
    region
        .reset(&identity().header(region_state::OPEN, 4, LOG).unwrap())
        .unwrap();
    let mut bytes = vec![0; (LOG_OFFSET + LOG) as usize];
    region.read_at(0, &mut bytes).unwrap();
    assert_eq!(region.header().unwrap().epoch, 4);
    assert!(
        bytes[size_of::<RegionHeader>()..]
            .iter()
            .all(|byte| *byte == 0)
    );
}
