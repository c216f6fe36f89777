//! One packed pass: sub-images in, rows of image tokens out. What the engine runs, and the seam at which tests hold it.

use crate::{
    EngineOptions,
    model::{PassLimits, VisionModel},
    preprocess::PatchGrid,
};
use idefics_kernels::{Backend, DType, Element, Error, Result, Tensor, WeightLoader};

const _: () = assert!(cfg!(target_endian = "little"), "tensors are little-endian on the wire and are sent as they lie in memory");

/// Runs passes. Lives on the engine's thread.
pub trait RunPass {
    /// How much one pass takes.
    fn limits(&self) -> PassLimits;

    /// What comes out.
    fn tokens_shape(&self) -> TokensShape;

    /// Encodes `sub_images` in one pass. Each of `outputs` gets the rows of as many of them as fit into it, in order; together
    /// they have room for all, and each is aligned for the activation type. Blocks until the device is done.
    ///
    /// # Errors
    /// If the sub-images are more than [`limits`](Self::limits) allow, or the device fails.
    fn run(&mut self, sub_images: &[&PatchGrid], outputs: &mut [&mut [u8]]) -> Result<()>;
}

/// Image tokens of one sub-image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokensShape {
    /// The activation type of the backend.
    pub dtype: DType,
    /// Rows.
    pub tokens: usize,
    /// Columns.
    pub hidden: usize,
}

impl TokensShape {
    /// Bytes of one sub-image.
    pub fn bytes(&self) -> usize {
        self.tokens * self.hidden * self.dtype.size()
    }
}

/// The model on its device.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: VisionModel<B>,
    limits: PassLimits,
    shape: TokensShape,
}

impl<B: Backend> ModelRunner<B> {
    /// Loads the weights and allocates the activations of the largest pass. Blocks.
    ///
    /// # Errors
    /// If the weights are not those of `options.model`, or the device has no room.
    pub fn load(backend: B, options: &EngineOptions) -> Result<Self> {
        let config = &options.model;
        let side = config.vision_config.num_patches_per_side();
        let max_patches = options.max_batch_patches.max(side * side);
        let limits = PassLimits { max_patches, max_sub_images: (max_patches / 64).clamp(1, 256) };
        let loader = WeightLoader::new(&backend, &options.weights, &*options.progress);
        let model = VisionModel::load(&backend, &loader, config, &options.normalization, limits)?;
        let perceiver = &config.perceiver_config;
        let shape = TokensShape { dtype: backend.activation_dtype(), tokens: perceiver.resampler_n_latents, hidden: perceiver.hidden_size };
        Ok(Self { backend, model, limits, shape })
    }
}

impl<B: Backend> RunPass for ModelRunner<B> {
    fn limits(&self) -> PassLimits {
        self.limits
    }

    fn tokens_shape(&self) -> TokensShape {
        self.shape
    }

    fn run(&mut self, sub_images: &[&PatchGrid], outputs: &mut [&mut [u8]]) -> Result<()> {
        let rows = self.model.forward(&self.backend, sub_images)?;
        let row_bytes = rows.cols() * rows.dtype().size();
        let mut at = 0;
        for output in outputs {
            rows.set_window(at..at + output.len() / row_bytes)?;
            at = rows.window().end;
            match rows.dtype() {
                DType::F32 => download::<f32, B>(&self.backend, rows, output)?,
                DType::F16 => download::<half::f16, B>(&self.backend, rows, output)?,
                DType::Bf16 => download::<half::bf16, B>(&self.backend, rows, output)?,
                other => return Err(Error::shape("download", format!("{other} is not an activation type"))),
            }
        }
        Ok(())
    }
}

/// The window of `tensor`, straight to where it is needed.
fn download<T: Element, B: Backend>(backend: &B, tensor: &Tensor<B>, output: &mut [u8]) -> Result<()> {
    let values = bytemuck::try_cast_slice_mut(output).map_err(|e| Error::shape("download", e.to_string()))?;
    backend.download::<T>(tensor, values)
}
