//! Addresses to listen on, as configuration and command line give them: `HOST:PORT`.

use tokio::net::{TcpListener, lookup_host};

/// Says what is wrong with an address, before anything is resolved.
pub(crate) fn check(address: &str) -> Result<(), String> {
    // An IPv6 address has colons of its own, and brackets around it.
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    let is_host = !host.is_empty() && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')));
    if is_host && port.parse::<u16>().is_ok() {
        return Ok(());
    }
    Err(format!("is {address:?}, expected HOST:PORT such as 127.0.0.1:50051, [::]:50051 or localhost:50051"))
}

/// Resolves an address and listens on the first of what it resolves to that can be listened on. `flag` is what chooses
/// another.
///
/// # Errors
/// If the address does not resolve, or none can be listened on.
pub(crate) async fn bind(address: &str, flag: &str) -> std::io::Result<TcpListener> {
    let error = |e: std::io::Error, what: String| std::io::Error::new(e.kind(), format!("{what}: {e}; choose another with {flag}"));
    let resolved = lookup_host(address).await.map_err(|e| error(e, format!("cannot resolve {address:?}, the address to listen on")))?;
    let mut failed = None;
    for resolved in resolved {
        match TcpListener::bind(resolved).await {
            Ok(listener) => return Ok(listener),
            Err(e) => failed = Some(error(e, format!("cannot listen on {address} ({resolved})"))),
        }
    }
    Err(failed.unwrap_or_else(|| std::io::Error::other(format!("{address:?} resolves to no address; choose another with {flag}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["127.0.0.1:0", "localhost:50051", "[::1]:65535", "decoder-0.decoder:50053"] {
            assert_eq!(check(good), Ok(()));
        }
        for bad in ["", "localhost", ":50051", "localhost:", "localhost:65536", "localhost:http", "::1:50051", "http://localhost:1"] {
            let problem = check(bad).unwrap_err();
            assert!(problem.contains(&format!("{bad:?}")) && problem.contains("localhost:50051"), "{problem}");
        }
    }

    #[tokio::test]
    async fn host_names_are_resolved() {
        let listener = bind("localhost:0", "--grpc-addr").await.unwrap();
        assert!(listener.local_addr().unwrap().ip().is_loopback());
    }

    #[tokio::test]
    async fn failures_say_what_to_change() {
        // The top-level domain `invalid` never resolves, RFC 6761.
        let error = bind("nowhere.invalid:50051", "--grpc-addr").await.unwrap_err().to_string();
        assert!(error.starts_with("cannot resolve \"nowhere.invalid:50051\"") && error.contains("--grpc-addr"), "{error}");
        let taken = bind("localhost:0", "--metrics-addr").await.unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let error = bind(&address, "--metrics-addr").await.unwrap_err().to_string();
        assert!(error.starts_with("cannot listen on") && error.contains("--metrics-addr"), "{error}");
    }
}
