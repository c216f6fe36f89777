//! A server's shutdown, seen by clients over a network.

use idefics_common::serve::{RoleServer, ServerConfig, ServerHandle, Shutdown};
use idefics_proto::vision::v1::{
    EncodeRequest, EncodeResponse, GetInfoRequest, GetInfoResponse,
    vision_service_client::VisionServiceClient,
    vision_service_server::{VisionService, VisionServiceServer},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
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
        Self::start_with(ServerConfig::default()).await
    }

    /// The same, on a free port but otherwise as configured.
    async fn start_with(config: ServerConfig) -> Self {
        let config = ServerConfig { grpc_addr: "127.0.0.1:0".into(), ..config };
        let server = RoleServer::bind(config, vec!["test.Service"]).await.unwrap();
        let (address, handle, shutdown) = (server.local_addr().unwrap(), server.handle(), Shutdown::default());
        handle.set_serving(true).await;
        let serving = server.serve(shutdown.clone());
        Self { address, handle, shutdown, serving: tokio::spawn(async move { serving.await.unwrap() }) }
    }

    fn install(&self, told: &Told) {
        let mut routes = RoutesBuilder::default();
        routes.add_service(VisionServiceServer::new(told.clone()));
        self.handle.install(routes);
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
    // An engine that becomes ready now does not bring the server back.
    server.handle.set_serving(true).await;
    assert_eq!(watcher.message().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(answers.message().await.unwrap_err().code(), Code::Unavailable);
    server.ended().await;
}

#[tokio::test]
async fn watchers_of_health_hear_only_news() {
    let server = Running::start().await;
    let mut client = HealthClient::new(server.channel().await);
    let request = HealthCheckRequest { service: "test.Service".into() };
    let mut watcher = client.watch(request.clone()).await.unwrap().into_inner();
    assert_eq!(watcher.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.handle.set_serving(true).await;
    // What a watcher is sent comes before the answer to a later call on its connection.
    assert_eq!(client.check(request).await.unwrap().into_inner().status(), ServingStatus::Serving);
    server.handle.set_serving(false).await;
    assert_eq!(watcher.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    server.shutdown.stop_accepting.cancel();
    assert_eq!(watcher.message().await.unwrap_err().code(), Code::Unavailable);
    server.ended().await;
}

/// Answers `Encode` when it is told to.
#[derive(Clone, Default)]
struct Told {
    asked: Arc<Notify>,
    answer: Arc<Notify>,
    /// Calls that wait for their answer, and the most that ever did.
    waiting: Arc<(AtomicUsize, AtomicUsize)>,
}

#[tonic::async_trait]
impl VisionService for Told {
    async fn encode(&self, _: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        let (now, most) = &*self.waiting;
        most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.asked.notify_one();
        self.answer.notified().await;
        now.fetch_sub(1, Ordering::Relaxed);
        Ok(Response::new(EncodeResponse { tokens: 7, ..Default::default() }))
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

#[tokio::test]
async fn shutdown_waits_for_calls_of_the_roles_own() {
    let server = Running::start().await;
    let told = Told::default();
    server.install(&told);
    let channel = server.channel().await;
    let mut watcher = HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let call = tokio::spawn(async move { VisionServiceClient::new(channel).encode(EncodeRequest::default()).await });
    told.asked.notified().await;

    server.shutdown.stop_accepting.cancel();
    // The end of the watcher is the last thing that a shutdown does before it waits.
    while watcher.message().await.is_ok() {}
    assert!(!server.serving.is_finished());
    told.answer.notify_one();
    assert_eq!(call.await.unwrap().unwrap().into_inner().tokens, 7);
    server.ended().await;
}

#[tokio::test]
async fn calls_on_a_connection_are_as_many_as_configured() {
    let server = Running::start_with(ServerConfig { max_concurrent_streams: 2, ..ServerConfig::default() }).await;
    let told = Told::default();
    server.install(&told);
    let channel = server.channel().await;
    // With its first answer a client has the server's settings.
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap();
    let client = VisionServiceClient::new(channel);
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.encode(EncodeRequest::default()).await.map(drop) })
        })
        .collect();
    told.asked.notified().await;
    while calls.iter().any(|call| !call.is_finished()) {
        told.answer.notify_one();
        tokio::task::yield_now().await;
    }
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert!(told.waiting.1.load(Ordering::Relaxed) <= 2);
}
