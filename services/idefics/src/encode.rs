//! `idefics encode`: pictures to a safetensors file.

use crate::{
    cli::EncodeArgs,
    endpoint::{Endpoint, describe, image_options, read_image},
};
use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use idefics_proto::{
    gateway::v1::EncodeImagesRequest,
    tensor::v1::{DataType, Tensor},
};
use safetensors::{Dtype, tensor::TensorView};

/// Encodes and writes.
pub(crate) async fn run(args: EncodeArgs) -> Result<()> {
    let images = args.images.iter().map(|path| read_image(path)).collect::<Result<Vec<_>>>()?;
    let mut endpoint = Endpoint::open(&args.model).await?;
    let request = EncodeImagesRequest { images, image_options: Some(image_options(&args.image_options)) };
    let response = endpoint.client.encode_images(request).await.map_err(describe)?.into_inner();
    let tensor = response.image_tokens.context("the gateway sent no image tokens")?;
    let (shape, data) = to_f32(&tensor)?;
    let view = TensorView::new(Dtype::F32, shape.clone(), &data).context("the gateway's tensor is malformed")?;
    safetensors::serialize_to_file([("image_tokens", view)], None, &args.out)
        .with_context(|| format!("{} cannot be written", args.out.display()))?;
    eprintln!("wrote image_tokens {shape:?} f32 to {}", args.out.display());
    Ok(())
}

/// Shape, and little-endian f32 elements.
fn to_f32(tensor: &Tensor) -> Result<(Vec<usize>, Vec<u8>)> {
    let shape = tensor.shape.iter().map(|n| *n as usize).collect();
    let pairs = || tensor.data.chunks_exact(2).map(|b| [b[0], b[1]]);
    let data = match tensor.dtype() {
        DataType::F32 => tensor.data.to_vec(),
        DataType::F16 => pairs().flat_map(|b| f16::from_le_bytes(b).to_f32().to_le_bytes()).collect(),
        DataType::Bf16 => pairs().flat_map(|b| bf16::from_le_bytes(b).to_f32().to_le_bytes()).collect(),
        DataType::Unspecified => bail!("the gateway sent a tensor of unknown dtype {}", tensor.dtype),
    };
    Ok((shape, data))
}
