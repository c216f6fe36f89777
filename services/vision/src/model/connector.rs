//! The modality projection: a gated MLP that takes every patch from the vision tower's width to the text model's, before the
//! Perceiver pools them.
//!
//! Reference: `Idefics2MLP` and `Idefics2Connector` in `transformers/models/idefics2/modeling_idefics2.py`.

use idefics_common::checkpoint::ModelConfig;
use idefics_kernels::{Backend, Epilogue, Matrix, Result, Tensor, WeightLoader};

/// Rows projected at once: the gate and up activations of 4,900 patches would take 560 MB in f32.
const CHUNK_ROWS: usize = 512;

pub(super) struct ModalityProjection<B: Backend> {
    gate_up_proj: Matrix<B>, // gate and up stacked: [2 * intermediate, vision hidden]
    down_proj: Matrix<B>,    // [text hidden, intermediate]
    gate_up: Tensor<B>,      // [chunk, 2 * intermediate]
    activated: Tensor<B>,    // [chunk, intermediate]
    output: Tensor<B>,       // [P, text hidden]
}

impl<B: Backend> ModalityProjection<B> {
    pub(super) fn load(backend: &B, loader: &WeightLoader<'_, B>, config: &ModelConfig, max_patches: usize) -> Result<Self> {
        let (vision, hidden, intermediate) =
            (config.vision_config.hidden_size, config.text_config.hidden_size, config.text_config.intermediate_size);
        let alloc = |rows, cols| backend.alloc(rows, cols, backend.activation_dtype());
        let chunk = CHUNK_ROWS.min(max_patches);
        Ok(Self {
            gate_up_proj: loader.stacked(["gate_proj.weight", "up_proj.weight"].map(|name| (name, [intermediate, vision])))?,
            down_proj: loader.tensor("down_proj.weight", [hidden, intermediate])?,
            gate_up: alloc(chunk, 2 * intermediate)?,
            activated: alloc(chunk, intermediate)?,
            output: alloc(max_patches, hidden)?,
        })
    }

    /// `down(silu(gate(x)) * up(x))`: `[P, vision hidden]` to `[P, text hidden]`. Slides the window of `patches`.
    pub(super) fn forward(&mut self, backend: &B, patches: &mut Tensor<B>) -> Result<&Tensor<B>> {
        let total = patches.rows();
        for start in (0..total).step_by(CHUNK_ROWS) {
            let window = start..total.min(start + CHUNK_ROWS);
            patches.set_window(window.clone())?;
            self.output.set_window(window.clone())?;
            self.gate_up.set_rows(window.len())?;
            self.activated.set_rows(window.len())?;
            backend.linear(patches, &self.gate_up_proj, None, Epilogue::Store, &mut self.gate_up)?;
            backend.silu_and_mul(&self.gate_up, &mut self.activated)?;
            backend.linear(&self.activated, &self.down_proj, None, Epilogue::Store, &mut self.output)?;
        }
        self.output.set_rows(total)?;
        Ok(&self.output)
    }
}
