//! A decoder that notes what is shipped to it, or refuses it.

use idefics_proto::decoder::v1::{
    CancelChoiceRequest, CancelChoiceResponse, GenerateRequest, GenerateResponse, GetInfoRequest, GetInfoResponse, PutImageTokensRequest,
    PutImageTokensResponse, ReleaseRequest, ReleaseResponse, ReserveRequest, ReserveResponse, decoder_service_server::DecoderService,
};
use std::sync::{Arc, Mutex};
use tonic::{Request, Response, Status};

#[derive(Clone, Default)]
pub(crate) struct FakeDecoder {
    /// What it has taken.
    pub(crate) shipped: Arc<Mutex<Vec<PutImageTokensRequest>>>,
    /// What it answers instead of taking anything.
    pub(crate) refusal: Arc<Mutex<Option<Status>>>,
}

#[tonic::async_trait]
impl DecoderService for FakeDecoder {
    type GenerateStream = futures::stream::Empty<Result<GenerateResponse, Status>>;

    async fn put_image_tokens(&self, request: Request<PutImageTokensRequest>) -> Result<Response<PutImageTokensResponse>, Status> {
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        self.shipped.lock().unwrap().push(request.into_inner());
        Ok(Response::new(PutImageTokensResponse {}))
    }

    async fn reserve(&self, _: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        Err(Status::unimplemented("vision does not call it"))
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        Err(Status::unimplemented("vision does not call it"))
    }

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("vision does not call it"))
    }

    async fn cancel_choice(&self, _: Request<CancelChoiceRequest>) -> Result<Response<CancelChoiceResponse>, Status> {
        Err(Status::unimplemented("vision does not call it"))
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        Err(Status::unimplemented("vision does not call it"))
    }
}
