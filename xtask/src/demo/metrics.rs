//! What the owner's metrics said last: the only word about the lag that counts after a crash.

use anyhow::{Context as _, Result};

/// One look at the owner's metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    /// Largest lag of the last 10 to 20 seconds, records.
    pub(super) lag_peak_records: u64,
    /// The volume's protection.
    pub(super) protection: String,
}

impl Sample {
    /// Reads it from the endpoint's text.
    ///
    /// # Errors
    /// If something is missing.
    pub(super) fn read(text: &str, volume: &str) -> Result<Self> {
        let of_volume = |name: &str| -> Vec<(String, f64)> {
            let mine = format!("volume=\"{volume}\"");
            text.lines()
                .filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.split_once("} "))
                .filter(|(labels, _)| labels.split(',').any(|label| label == mine))
                .filter_map(|(labels, value)| Some((labels.to_owned(), value.parse().ok()?)))
                .collect()
        };
        let peak = of_volume("twinwrite_lag_peak_records");
        let (_, peak) = peak
            .first()
            .context("the metrics hold no twinwrite_lag_peak_records")?;
        let states = of_volume("twinwrite_protection_state");
        let protection = states
            .iter()
            .find(|(_, value)| *value == 1.0)
            .and_then(|(labels, _)| {
                let label = labels.split(',').find_map(|l| l.strip_prefix("state="))?;
                Some(label.trim_matches('"').to_owned())
            })
            .context("the metrics hold no twinwrite_protection_state that is 1")?;
        Ok(Self {
            // A count of records: far below what a float holds exactly.
            lag_peak_records: *peak as u64,
            protection,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Sample;

    const TEXT: &str = "# TYPE twinwrite_lag_peak_records gauge\n\
        twinwrite_lag_peak_records{volume=\"other\"} 7.0\n\
        twinwrite_lag_peak_records{volume=\"vol0\"} 40.0\n\
        twinwrite_protection_state{volume=\"other\",state=\"protected\"} 1.0\n\
        twinwrite_protection_state{volume=\"vol0\",state=\"protected\"} 0.0\n\
        twinwrite_protection_state{volume=\"vol0\",state=\"exposed\"} 1.0\n";

    #[test]
    fn the_volume_s_own_lines_are_read() {
        let sample = Sample::read(TEXT, "vol0").expect("a sample");
        assert_eq!(sample.lag_peak_records, 40);
        assert_eq!(sample.protection, "exposed");
    }

    #[test]
    fn what_is_missing_is_an_error() {
        assert!(Sample::read(TEXT, "vol1").is_err());
        let without = TEXT.replace("\"exposed\"} 1.0", "\"exposed\"} 0.0");
        assert!(Sample::read(&without, "vol0").is_err());
    }
}
