//! What is measured, as it stands on the command line.

use std::{fmt, str::FromStr};

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The CPU.
    Cpu,
    /// A card, as the driver counts them.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = || text.strip_prefix("cuda:").and_then(|n| n.parse().ok());
        match text {
            "cpu" => Ok(Self::Cpu),
            _ => ordinal().map(Self::Cuda).ok_or_else(|| format!("device is {text:?}, expected cpu or cuda:N")),
        }
    }
}

/// A picture to encode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PictureCase {
    /// Pixels a row.
    pub(crate) width: u32,
    /// Rows of pixels.
    pub(crate) height: u32,
    /// Shown as four crops and a whole.
    pub(crate) split: bool,
}

impl FromStr for PictureCase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (size, split) = text.strip_suffix(":split").map_or((text, false), |size| (size, true));
        let pixels = |text: &str| text.parse().ok().filter(|pixels| (1..=32_768).contains(pixels));
        let (width, height) = size
            .split_once('x')
            .and_then(|(width, height)| pixels(width).zip(pixels(height)))
            .ok_or_else(|| format!("picture is {text:?}, expected a size such as 980x980 or 980x980:split"))?;
        Ok(Self { width, height, split })
    }
}

impl fmt::Display for PictureCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}{}", self.width, self.height, if self.split { ":split" } else { "" })
    }
}

/// Sequences that decode together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DecodeCase {
    /// Tokens that each has before the first step.
    pub(crate) context: usize,
    /// How many they are.
    pub(crate) batch: usize,
}

impl FromStr for DecodeCase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|n| *n > 0);
        let (batch, context) = text
            .split_once('x')
            .and_then(|(batch, context)| number(batch).zip(number(context)))
            .ok_or_else(|| format!("decode case is {text:?}, expected a batch and a context such as 64x512"))?;
        Ok(Self { context, batch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_read_as_they_are_written() {
        let split = PictureCase { width: 980, height: 392, split: true };
        assert_eq!(("980x392:split".parse(), split.to_string().as_str()), (Ok(split), "980x392:split"));
        assert_eq!("378x378".parse(), Ok(PictureCase { width: 378, height: 378, split: false }));
        assert_eq!("64x512".parse(), Ok(DecodeCase { batch: 64, context: 512 }));
        assert_eq!(["cpu".parse(), "cuda:1".parse()], [Ok(Device::Cpu), Ok(Device::Cuda(1))]);
    }

    #[test]
    fn cases_that_make_no_sense_are_refused() {
        for bad in ["", "980", "0x980", "980x", "980x980:halves", "99999x1"] {
            assert!(bad.parse::<PictureCase>().unwrap_err().contains("expected a size"), "{bad}");
        }
        for bad in ["", "64", "0x512", "64x0", "64x-1"] {
            assert!(bad.parse::<DecodeCase>().unwrap_err().contains("expected a batch"), "{bad}");
        }
        for bad in ["", "gpu", "cuda", "cuda:x"] {
            assert!(bad.parse::<Device>().unwrap_err().contains("expected cpu or cuda:N"), "{bad}");
        }
    }
}
