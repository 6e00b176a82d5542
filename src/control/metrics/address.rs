//! Where metrics are asked for.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A Unix socket, or one that is reached by network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// Its path.
    Unix(PathBuf),
    /// With port 0, the kernel chooses one.
    Tcp(SocketAddr),
}

/// No [`MetricsAddress`].
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// Of a Unix socket.
    #[error("a Unix socket is written as unix:PATH")]
    Path,
    /// At the end.
    #[error("it needs a port at the end, as in 127.0.0.1:9620 or [::1]:9620")]
    Port,
    /// Nobody is asked for names.
    #[error("it needs an IP address before the port, as in 127.0.0.1:9620 or [::1]:9620")]
    Host,
}

impl MetricsAddress {
    /// Reads `unix:PATH`, `ADDRESS:PORT` with an address of IPv6 in brackets,
    /// `localhost:PORT`, or `PORT`, which is one of 127.0.0.1.
    ///
    /// # Errors
    /// If it is something else.
    pub fn parse(text: &OsStr) -> Result<Self, AddressError> {
        if let Some(path) = text.as_bytes().strip_prefix(b"unix:") {
            let path = Some(path).filter(|path| !path.is_empty());
            let path = path.ok_or(AddressError::Path)?;
            return Ok(Self::Unix(OsStr::from_bytes(path).into()));
        }
        let Some(text) = text.to_str().filter(|text| !text.contains('/')) else {
            return Err(AddressError::Path);
        };
        if let Ok(port) = text.parse() {
            return Ok(Self::Tcp(SocketAddr::new(LOCALHOST, port)));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Tcp(address));
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::Port)?;
        // All else of an address without its brackets would be taken for a host.
        let port = Some(port).filter(|_| !host.contains(':') || host.starts_with('['));
        let port = port.and_then(|port| port.parse().ok());
        let port = port.ok_or(AddressError::Port)?;
        match host {
            "localhost" => Ok(Self::Tcp(SocketAddr::new(LOCALHOST, port))),
            _ => Err(AddressError::Host),
        }
    }

    /// Of a Unix socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }
}

/// This host, and nobody else.
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_or_has_an_ip_address_and_a_port() {
        let parse = |text: &str| MetricsAddress::parse(OsStr::new(text));
        for (text, address) in [
            ("127.0.0.1:9620", "127.0.0.1:9620"),
            ("0.0.0.0:0", "0.0.0.0:0"),
            ("[::1]:9620", "[::1]:9620"),
            ("[::]:80", "[::]:80"),
            ("localhost:9620", "127.0.0.1:9620"),
            ("9620", "127.0.0.1:9620"),
        ] {
            let expected = MetricsAddress::Tcp(address.parse().unwrap());
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
        let path = MetricsAddress::Unix("/run/a:b".into());
        assert_eq!(parse("unix:/run/a:b"), Ok(path));
        let odd = OsStr::from_bytes(b"unix:a\xff");
        let path = MetricsAddress::Unix(OsStr::from_bytes(b"a\xff").into());
        assert_eq!(MetricsAddress::parse(odd), Ok(path));
        for (text, error) in [
            ("unix:", AddressError::Path),
            ("/run/socket", AddressError::Path),
            ("http://127.0.0.1:9620", AddressError::Path),
            ("", AddressError::Port),
            ("::1", AddressError::Port),
            ("::1:9620", AddressError::Port),
            ("[::1]", AddressError::Port),
            ("localhost", AddressError::Port),
            ("65536", AddressError::Port),
            ("127.0.0.1", AddressError::Port),
            ("127.0.0.1:", AddressError::Port),
            ("127.0.0.1:70000", AddressError::Port),
            (":9620", AddressError::Host),
            ("*:9620", AddressError::Host),
            ("example.org:9620", AddressError::Host),
            ("[localhost]:9620", AddressError::Host),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }
}
