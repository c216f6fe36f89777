//! Ranges on the command line, as in `16..32`.

use rand::Rng;
use serde::Serialize;
use std::{fmt, str::FromStr};

/// Whole numbers of 1 or more, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Range {
    /// The least.
    pub least: u32,
    /// The most.
    pub most: u32,
}

impl Range {
    /// One of its numbers, each as likely as the others.
    pub fn draw(self, rng: &mut impl Rng) -> u32 {
        rng.random_range(self.least..=self.most)
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        match (least.parse(), most.parse()) {
            (Ok(least), Ok(most)) if 0 < least && least <= most => Ok(Self { least, most }),
            _ => Err(format!("expected a number or a range such as 16..32 of numbers from 1 up, found {text:?}")),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.least, self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_bad_ones_refused() {
        assert_eq!("16..32".parse(), Ok(Range { least: 16, most: 32 }));
        assert_eq!("7".parse(), Ok(Range { least: 7, most: 7 }));
        for bad in ["", "0..4", "5..4", "a..b", "1..2..3"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }
}
