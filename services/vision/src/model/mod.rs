//! From pixels to image tokens: vision tower, modality projection, Perceiver.
//!
//! Laurençon et al. 2024, "What matters when building vision-language models?", <https://arxiv.org/abs/2405.02246>;
//! reference: `transformers/models/idefics2/modeling_idefics2.py`.

mod connector;
mod perceiver;
mod siglip;

use crate::preprocess::{Normalization, PatchGrid, position_ids};
use connector::ModalityProjection;
use idefics_common::checkpoint::ModelConfig;
use idefics_kernels::{Backend, DType, Error, GraphKey, Pictures, Result, Tensor, WeightLoader};
use perceiver::Perceiver;
use siglip::VisionTower;

/// Vision tower and connector of a checkpoint, with the activations of one forward pass.
pub struct VisionModel<B: Backend> {
    tower: VisionTower<B>,
    modality_projection: ModalityProjection<B>,
    perceiver: Perceiver<B>,
    inputs: Inputs<B>,
    position_side: usize,
    patch_size: usize,
}

/// What a pass reads from the host.
struct Inputs<B: Backend> {
    pixels: Tensor<B>,        // [P * patch * patch, 3] u8: pictures, not yet patches
    origins: Tensor<B>,       // [P, 1] i32: first pixel of a patch
    widths: Tensor<B>,        // [P, 1] i32: pixels a row of its picture
    normalization: Tensor<B>, // [3, 256] f32
    position_ids: Tensor<B>,  // [P, 1] i32
    cu_seqlens: Tensor<B>,    // [S + 1, 1] i32: patches
    cu_seqlens_q: Tensor<B>,  // [S + 1, 1] i32: latents
    cu_seqlens_k: Tensor<B>,  // [S + 1, 1] i32: patches and latents
    latent_ids: Tensor<B>,    // [S * L, 1] i32: 0..L for each sub-image
    context_rows: Tensor<B>,  // [P, 1] i32: where a patch's key goes
    latent_rows: Tensor<B>,   // [S * L, 1] i32: where a latent's key goes
}

/// How much one forward pass takes.
#[derive(Clone, Copy, Debug)]
pub struct PassLimits {
    /// Most patches, at least those of the largest sub-image.
    pub max_patches: usize,
    /// Most sub-images.
    pub max_sub_images: usize,
}

/// How sub-images lie behind one another in a pass.
pub(crate) struct Packing<'a, B: Backend> {
    pub(crate) cu_seqlens: &'a Tensor<B>,
    pub(crate) cu_seqlens_q: &'a Tensor<B>,
    pub(crate) cu_seqlens_k: &'a Tensor<B>,
    pub(crate) latent_ids: &'a Tensor<B>,
    pub(crate) context_rows: &'a Tensor<B>,
    pub(crate) latent_rows: &'a Tensor<B>,
    pub(crate) max_patches: usize,
    pub(crate) latents: usize,
}

impl<B: Backend> VisionModel<B> {
    /// Loads the weights and allocates the activations of the largest pass.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than `config` says, or the device has no room.
    pub fn load(
        backend: &B,
        root: &WeightLoader<'_, B>,
        config: &ModelConfig,
        normalization: &Normalization,
        limits: PassLimits,
    ) -> Result<Self> {
        let (vision, latents) = (&config.vision_config, config.perceiver_config.resampler_n_latents);
        let limits = PassLimits { max_patches: backend.padded_rows(limits.max_patches), ..limits };
        let (patches, sub_images) = (limits.max_patches, limits.max_sub_images);
        let i32s = |rows| backend.alloc(rows, 1, DType::I32);
        let mut inputs = Inputs {
            pixels: backend.alloc(patches * vision.patch_size * vision.patch_size, vision.num_channels, DType::U8)?,
            origins: i32s(patches)?,
            widths: i32s(patches)?,
            normalization: backend.alloc(vision.num_channels, 256, DType::F32)?,
            position_ids: i32s(patches)?,
            cu_seqlens: i32s(sub_images + 1)?,
            cu_seqlens_q: i32s(sub_images + 1)?,
            cu_seqlens_k: i32s(sub_images + 1)?,
            latent_ids: i32s(sub_images * latents)?,
            context_rows: i32s(patches)?,
            latent_rows: i32s(sub_images * latents)?,
        };
        backend.upload(&normalization.table(), &mut inputs.normalization)?;
        let (model, connector) = (root.sub("model"), root.sub("model.connector"));
        Ok(Self {
            tower: VisionTower::load(backend, &model.sub("vision_model"), vision, patches)?,
            modality_projection: ModalityProjection::load(backend, &connector.sub("modality_projection"), config, patches)?,
            perceiver: Perceiver::load(backend, &connector.sub("perceiver_resampler"), &config.perceiver_config, limits)?,
            inputs,
            position_side: vision.num_patches_per_side(),
            patch_size: vision.patch_size,
        })
    }

    /// Image tokens of packed sub-images, `[sub-images * latents, hidden]` in the activation type; stays valid until the next
    /// pass. Its window may be moved.
    ///
    /// # Errors
    /// If the sub-images are more than the limits allow, or the device fails.
    pub fn forward(&mut self, backend: &B, sub_images: &[&PatchGrid]) -> Result<&mut Tensor<B>> {
        let max_patches = self.upload(backend, sub_images)?;
        let (inputs, latents) = (&self.inputs, self.perceiver.latents());
        let packing = Packing {
            cu_seqlens: &inputs.cu_seqlens,
            cu_seqlens_q: &inputs.cu_seqlens_q,
            cu_seqlens_k: &inputs.cu_seqlens_k,
            latent_ids: &inputs.latent_ids,
            context_rows: &inputs.context_rows,
            latent_rows: &inputs.latent_rows,
            max_patches,
            latents,
        };
        let pictures = Pictures {
            pixels: &inputs.pixels,
            origins: &inputs.origins,
            widths: &inputs.widths,
            table: &inputs.normalization,
            patch_size: self.patch_size,
        };
        let (tower, modality_projection, perceiver) = (&mut self.tower, &mut self.modality_projection, &mut self.perceiver);
        let key = GraphKey { name: "vision", sizes: [inputs.position_ids.rows(), sub_images.len(), max_patches] };
        backend.graphed(key, &mut || {
            let patches = tower.forward(backend, &pictures, &inputs.position_ids, &packing)?;
            let context = modality_projection.forward(backend, patches)?;
            perceiver.forward(backend, context, &packing)
        })?;
        // Not within `graphed`, which does not come back to that code when it replays.
        let image_tokens = self.perceiver.image_tokens();
        image_tokens.set_rows(sub_images.len() * latents)?;
        Ok(image_tokens)
    }

    /// Fills the inputs; returns the patches of the largest sub-image, padded. Patches that fill up a pass are all the same, of pixels that
    /// are there: they belong to no sub-image, so that nothing comes of them.
    fn upload(&mut self, backend: &B, sub_images: &[&PatchGrid]) -> Result<usize> {
        let latents = self.perceiver.latents();
        let patches: usize = sub_images.iter().map(|grid| grid.len()).sum();
        if patches > self.inputs.position_ids.capacity() || sub_images.len() + 1 > self.inputs.cu_seqlens.capacity() {
            let what = format!(
                "{} sub-images of {patches} patches in one pass, which takes {}",
                sub_images.len(),
                self.inputs.position_ids.capacity()
            );
            return Err(Error::shape("vision pass", what));
        }
        let (size, mut first_pixel) = (self.patch_size, 0);
        let (mut origins, mut widths, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let (mut cu_seqlens, mut cu_q, mut cu_k) = (vec![0], vec![0], vec![0]);
        let (mut latent_ids, mut context_rows, mut latent_rows) = (Vec::new(), Vec::new(), Vec::new());
        for grid in sub_images {
            let (count, width) = (grid.len() as i32, grid.cols * size);
            let pixels = grid.rows * size * width;
            self.inputs.pixels.set_window(first_pixel..first_pixel + pixels)?;
            backend.upload(&grid.pixels, &mut self.inputs.pixels)?;
            let cells = (0..grid.rows).flat_map(|row| (0..grid.cols).map(move |col| (row, col)));
            origins.extend(cells.map(|(row, col)| (first_pixel + row * size * width + col * size) as i32));
            first_pixel += pixels;
            let first = cu_k[cu_k.len() - 1];
            widths.resize(origins.len(), width as i32);
            positions.extend(position_ids(grid.rows, grid.cols, self.position_side));
            context_rows.extend(first..first + count);
            latent_rows.extend(first + count..first + count + latents as i32);
            latent_ids.extend(0..latents as i32);
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + count);
            cu_q.push(cu_q[cu_q.len() - 1] + latents as i32);
            cu_k.push(first + count + latents as i32);
        }
        // Their keys go behind all others.
        let padded = backend.padded_rows(patches) as i32;
        let end = cu_k[cu_k.len() - 1];
        context_rows.extend(end..end + padded - patches as i32);
        for values in [&mut origins, &mut widths, &mut positions] {
            values.resize(context_rows.len(), 0);
        }
        let inputs = &mut self.inputs;
        inputs.pixels.set_rows(context_rows.len() * size * size)?;
        for (values, tensor) in [
            (&origins, &mut inputs.origins),
            (&widths, &mut inputs.widths),
            (&positions, &mut inputs.position_ids),
            (&cu_seqlens, &mut inputs.cu_seqlens),
            (&cu_q, &mut inputs.cu_seqlens_q),
            (&cu_k, &mut inputs.cu_seqlens_k),
            (&latent_ids, &mut inputs.latent_ids),
            (&context_rows, &mut inputs.context_rows),
            (&latent_rows, &mut inputs.latent_rows),
        ] {
            tensor.set_rows(values.len())?;
            backend.upload(values, tensor)?;
        }
        Ok(backend.padded_rows(sub_images.iter().map(|grid| grid.len()).max().unwrap_or(0)))
    }
}
