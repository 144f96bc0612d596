//! The compiled kernels: what `make kernels` builds, one image per architecture, deflated.

use crate::{Error, Result};

macro_rules! images {
    ($($major:literal, $minor:literal: $name:literal),*) => {
        /// Compute capability that an image is made for, its name, and the image.
        const IMAGES: &[(i32, i32, &str, &[u8])] =
            &[$(($major, $minor, $name, include_bytes!(concat!("../../../kernels/images/", $name, ".z")))),*];
    };
}
images!(8, 0: "sm_80", 8, 6: "sm_86", 8, 9: "sm_89", 9, 0: "sm_90", 10, 0: "sm_100", 12, 0: "sm_120");

/// For every device from compute capability 8.0 on, compiled by its driver.
const PTX: &[u8] = include_bytes!("../../../kernels/images/compute_80.z");

/// The image that runs on a device: one of the same major version and not a later minor one (CUDA C++ Programming Guide,
/// "Binary compatibility"), or else the PTX. None before 8.0.
pub fn of(major: i32, minor: i32) -> Option<(&'static str, &'static [u8])> {
    let fits = IMAGES.iter().filter(|image| image.0 == major && image.1 <= minor).max_by_key(|image| image.1);
    match fits {
        Some(&(_, _, name, image)) => Some((name, image)),
        None if major >= 8 => Some(("compute_80 (PTX)", PTX)),
        None => None,
    }
}

/// Its bytes, and a 0, which ends text.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let unpacked = miniz_oxide::inflate::decompress_to_vec_zlib(image);
    let mut unpacked = unpacked.map_err(|_| Error::Internal("an image of the kernels is damaged".to_owned()))?;
    unpacked.push(0);
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_from_8_0_on_has_one() {
        let name = |major, minor| of(major, minor).map(|(name, _)| name);
        assert_eq!(name(7, 5), None);
        assert_eq!(name(8, 0), Some("sm_80"));
        assert_eq!(name(8, 7), Some("sm_86"));
        assert_eq!(name(8, 9), Some("sm_89"));
        assert_eq!(name(9, 0), Some("sm_90"));
        assert_eq!(name(10, 3), Some("sm_100"));
        assert_eq!(name(11, 0), Some("compute_80 (PTX)"));
        assert_eq!(name(12, 1), Some("sm_120"));
        assert_eq!(name(13, 0), Some("compute_80 (PTX)"));
    }

    #[test]
    fn they_unpack_to_binaries_and_text() {
        for &(.., name, image) in IMAGES {
            let image = unpack(image).unwrap();
            assert!(image.starts_with(b"\x7fELF") && image.len() > 100_000, "{name}");
        }
        let ptx = String::from_utf8(unpack(PTX).unwrap()).unwrap();
        assert!(ptx.contains(".target sm_80") && ptx.contains(".entry akv_attend_4"));
        assert!(unpack(&PTX[..1000]).is_err());
    }
}
