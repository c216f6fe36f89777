//! A server's shutdown, seen by clients over a network.

use idefics_common::serve::{RoleServer, ServerConfig, ServerHandle, Shutdown};
use idefics_proto::vision::v1::{
    EncodeRequest, EncodeResponse, GetInfoRequest, GetInfoResponse,
    vision_service_client::VisionServiceClient,
    vision_service_server::{VisionService, VisionServiceServer},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{sync::Notify, task::JoinHandle};
use tonic::{
    Code, Request, Response, Status,
    service::RoutesBuilder,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
};

/// Only a hang takes this long.
const DEADLINE: Duration = Duration::from_secs(60);

/// A server in this process.
struct Running {
    address: SocketAddr,
    handle: ServerHandle,
    shutdown: Shutdown,
    serving: JoinHandle<()>,
}

impl Running {
    /// Serving, without services.
    async fn start() -> Self {
        let config = ServerConfig { grpc_addr: ([127, 0, 0, 1], 0).into(), ..ServerConfig::default() };
        let server = RoleServer::bind(config, vec!["test.Service"]).await.unwrap();
        let (address, handle, shutdown) = (server.local_addr().unwrap(), server.handle(), Shutdown::default());
        handle.set_serving(true).await;
        let serving = server.serve(shutdown.clone());
        Self { address, handle, shutdown, serving: tokio::spawn(async move { serving.await.unwrap() }) }
    }

    async fn channel(&self) -> Channel {
        Endpoint::new(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    /// Returns when the server has ended; nobody cancels what runs.
    async fn ended(self) {
        tokio::time::timeout(DEADLINE, self.serving).await.expect("the server ends").unwrap();
    }
}

#[tokio::test]
async fn shutdown_ends_health_and_reflection_streams() {
    let server = Running::start().await;
    let channel = server.channel().await;
    let request = HealthCheckRequest { service: "test.Service".into() };
    let mut watcher = HealthClient::new(channel.clone()).watch(request).await.unwrap().into_inner();
    assert_eq!(watcher.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let list = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let questions = tokio_stream::StreamExt::chain(tokio_stream::once(list), tokio_stream::pending());
    let mut answers = ServerReflectionClient::new(channel).server_reflection_info(questions).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();

    server.shutdown.stop_accepting.cancel();
    assert_eq!(watcher.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(watcher.message().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(answers.message().await.unwrap_err().code(), Code::Unavailable);
    server.ended().await;
}

/// Answers `Encode` when it is told to.
struct Told {
    asked: Arc<Notify>,
    answer: Arc<Notify>,
}

#[tonic::async_trait]
impl VisionService for Told {
    async fn encode(&self, _: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        self.asked.notify_one();
        self.answer.notified().await;
        Ok(Response::new(EncodeResponse { tokens: 7, ..Default::default() }))
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

#[tokio::test]
async fn shutdown_waits_for_calls_of_the_roles_own() {
    let server = Running::start().await;
    let (asked, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let mut routes = RoutesBuilder::default();
    routes.add_service(VisionServiceServer::new(Told { asked: Arc::clone(&asked), answer: Arc::clone(&answer) }));
    server.handle.install(routes);
    let channel = server.channel().await;
    let mut watcher = HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let call = tokio::spawn(async move { VisionServiceClient::new(channel).encode(EncodeRequest::default()).await });
    asked.notified().await;

    server.shutdown.stop_accepting.cancel();
    // The end of the watcher is the last thing that a shutdown does before it waits.
    while watcher.message().await.is_ok() {}
    assert!(!server.serving.is_finished());
    answer.notify_one();
    assert_eq!(call.await.unwrap().unwrap().into_inner().tokens, 7);
    server.ended().await;
}
