//! Loads a model's weights by their path in the checkpoint.

use crate::{
    Backend, Matrix, Result,
    weights::{WeightView, Weights},
};

/// A place in the checkpoint's key hierarchy, from which a module loads its weights by name.
///
/// `loader.sub("layers.0").sub("self_attn").tensor("q_proj.weight", [rows, cols])` reads
/// `<prefix>.layers.0.self_attn.q_proj.weight`.
pub struct WeightLoader<'a, B: Backend> {
    backend: &'a B,
    weights: &'a Weights,
    prefix: String,
    progress: &'a dyn Fn(usize),
}

impl<'a, B: Backend> WeightLoader<'a, B> {
    /// A loader at the root. `progress` is called with the bytes of each tensor once it is in memory.
    pub fn new(backend: &'a B, weights: &'a Weights, progress: &'a dyn Fn(usize)) -> Self {
        Self { backend, weights, prefix: String::new(), progress }
    }

    /// The module `name` below this one.
    pub fn sub(&self, name: &str) -> Self {
        Self { backend: self.backend, weights: self.weights, prefix: self.key(name), progress: self.progress }
    }

    /// The tensor `name`, which must have this shape (any number of dimensions; all but the first are flattened).
    ///
    /// # Errors
    /// If it is missing, has another shape, or the device has no room.
    pub fn tensor<const N: usize>(&self, name: &str, shape: [usize; N]) -> Result<Matrix<B>> {
        self.stacked([(name, shape)])
    }

    /// The matrix `name` with rows of zeros below, to as many as the backend [likes](Backend::padded_features).
    ///
    /// # Errors
    /// Those of [`tensor`](Self::tensor).
    pub fn padded(&self, name: &str, shape: [usize; 2]) -> Result<Matrix<B>> {
        let view = self.weights.get(&self.key(name), &shape)?;
        let (bytes, missing) = (view.bytes().len(), self.backend.padded_features(shape[0]) - shape[0]);
        let zeros = (missing > 0).then(|| view.zeros_below(missing));
        let views: Vec<WeightView> = std::iter::once(view).chain(zeros).collect();
        let matrix = self.backend.load_weight(&views)?;
        (self.progress)(bytes);
        Ok(matrix)
    }

    /// Several tensors as one: matrices by rows, vectors end to end.
    ///
    /// # Errors
    /// Those of [`tensor`](Self::tensor).
    pub fn stacked<const N: usize, const PARTS: usize>(&self, parts: [(&str, [usize; N]); PARTS]) -> Result<Matrix<B>> {
        let views: Vec<WeightView> = parts.iter().map(|(name, shape)| self.weights.get(&self.key(name), shape)).collect::<Result<_>>()?;
        let matrix = self.backend.load_weight(&views)?;
        (self.progress)(views.iter().map(|view| view.bytes().len()).sum());
        Ok(matrix)
    }

    fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
