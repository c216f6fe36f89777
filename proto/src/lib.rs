//! Generated gRPC modules: messages, clients and servers of the three services.
//!
//! Nothing is written by hand here; the documentation of every field is in `proto/idefics/**.proto`.
#![forbid(unsafe_code)]
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

/// Tensors on the wire.
pub mod tensor {
    pub mod v1 {
        tonic::include_proto!("idefics.tensor.v1");
    }
}

/// The public API.
pub mod gateway {
    pub mod v1 {
        tonic::include_proto!("idefics.gateway.v1");
    }
}

/// Image bytes in, image tokens out.
pub mod vision {
    pub mod v1 {
        tonic::include_proto!("idefics.vision.v1");
    }
}

/// Token ids and image tokens in, generated tokens out.
pub mod decoder {
    pub mod v1 {
        tonic::include_proto!("idefics.decoder.v1");
    }
}

/// Every file above, encoded as a `google.protobuf.FileDescriptorSet`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
