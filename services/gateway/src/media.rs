//! The pictures of a request: a key for each, and each only once.

use crate::validate::{ImageOptions, Picture};
use bytes::Bytes;
use std::{collections::HashMap, fmt};

/// Names the image tokens of a picture: a hash of its bytes, of how they are cut and resized, and of the model.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ImageKey([u8; 32]);

impl ImageKey {
    /// Every part is preceded by its length or has a fixed one, so that no two different inputs look alike.
    pub(crate) fn new(model_fingerprint: &str, options: ImageOptions, data: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("idefics-serve image key, version 1");
        hasher.update(&(model_fingerprint.len() as u64).to_le_bytes()).update(model_fingerprint.as_bytes());
        hasher.update(&[u8::from(options.split)]);
        hasher.update(&options.longest_edge.to_le_bytes()).update(&options.shortest_edge.to_le_bytes());
        hasher.update(&(data.len() as u64).to_le_bytes()).update(data);
        Self(hasher.finalize().into())
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn to_wire(self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A picture that differs from the request's others.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) key: ImageKey,
    pub(crate) data: Bytes,
    /// Everywhere it came in the request.
    pub(crate) fields: Vec<String>,
}

/// The pictures of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Media {
    /// Each picture once, in the order of first appearance.
    pub(crate) images: Vec<Image>,
    /// For each picture of the request, its index in `images`.
    pub(crate) order: Vec<usize>,
}

impl Media {
    /// Hashes the pictures; blocks for about a millisecond per megabyte.
    pub(crate) fn new<'a>(model_fingerprint: &str, options: ImageOptions, pictures: impl IntoIterator<Item = &'a Picture>) -> Self {
        let mut media = Self::default();
        let mut known = HashMap::new();
        for picture in pictures {
            let key = ImageKey::new(model_fingerprint, options, &picture.data);
            let index = *known.entry(key).or_insert_with(|| {
                media.images.push(Image { key, data: picture.data.clone(), fields: Vec::new() });
                media.images.len() - 1
            });
            media.images[index].fields.push(picture.field.clone());
            media.order.push(index);
        }
        media
    }

    /// Frees the pictures' bytes, which are most of a request. Their keys stay.
    pub(crate) fn drop_pictures(&mut self) {
        self.images.iter_mut().for_each(|image| image.data = Bytes::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: ImageOptions = ImageOptions { split: false, longest_edge: 980, shortest_edge: 378 };

    #[test]
    fn everything_that_changes_the_tokens_changes_the_key() {
        let keys = [
            ImageKey::new("model", OPTIONS, b"picture"),
            ImageKey::new("other", OPTIONS, b"picture"),
            ImageKey::new("model", ImageOptions { split: true, ..OPTIONS }, b"picture"),
            ImageKey::new("model", ImageOptions { longest_edge: 979, ..OPTIONS }, b"picture"),
            ImageKey::new("model", ImageOptions { shortest_edge: 377, ..OPTIONS }, b"picture"),
            ImageKey::new("model", OPTIONS, b"Picture"),
            ImageKey::new("model", OPTIONS, b""),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(keys[0], ImageKey::new("model", OPTIONS, b"picture"));
    }

    #[test]
    fn duplicates_keep_all_their_places() {
        let picture = |data: &'static str, field: &str| Picture { data: data.into(), field: field.into() };
        let media = Media::new("model", OPTIONS, &[picture("a", "x"), picture("b", "y"), picture("a", "z")]);
        assert_eq!(media.order, [0, 1, 0]);
        assert_eq!(media.images[0].fields, ["x", "z"]);
    }
}
