//! What Prometheus itself makes of the metrics, and Grafana's dashboard of Prometheus.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{require_tool, tool};
use crate::front_end::PATIENCE;
use crate::metrics::{ON_TCP, address, every_name, text, write_and_read};
use crate::{Rig, start_front_end, wait_for};

const DASHBOARD: &str = include_str!("../../docs/metrics/dashboard.json");

/// Every query of the dashboard.
fn queries() -> Vec<String> {
    fn collect(value: &Value, queries: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    match value {
                        Value::String(text) if name == "expr" || name == "definition" => {
                            queries.push(text.clone());
                        }
                        _ => collect(value, queries),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, queries)),
            _ => {}
        }
    }
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("it is JSON");
    let mut queries = Vec::new();
    collect(&dashboard, &mut queries);
    assert!(queries.len() > 10, "{queries:?}");
    queries
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let rig = Rig::new();
    let (backend, names) = every_name(&rig);
    let is_of_name = |c: char| c == '_' || c.is_ascii_alphanumeric();
    for query in queries() {
        let words = query.split(|c| !is_of_name(c));
        let named: Vec<_> = words.filter(|word| word.starts_with("ploop_")).collect();
        assert!(!named.is_empty(), "{query}");
        for name in named {
            let parts = ["_bucket", "_sum", "_count"];
            let whole = parts.iter().find_map(|part| name.strip_suffix(part));
            let is_there = names.contains(name) || whole.is_some_and(|it| names.contains(it));
            assert!(is_there, "{name} in {query}");
        }
    }
    backend.stop();
}

#[test]
fn promtool_finds_nothing_wrong_with_the_page() {
    if !require_tool("promtool") {
        return;
    }
    let rig = Rig::new();
    let (backend, _) = every_name(&rig);
    let mut promtool = tool("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let page = text(&rig);
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(page.as_bytes())
        .unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}\n{page}");
    backend.stop();
}

/// A Prometheus that asks every second. Ends when it is dropped.
struct Prometheus {
    child: Child,
    address: String,
    folder: TempDir,
}

impl Prometheus {
    fn start(target: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let config = folder.path().join("prometheus.yml");
        let text = format!(
            "global:\n  scrape_interval: 1s\nscrape_configs:\n  - job_name: ploop\n    \
             static_configs:\n      - targets: [\"{target}\"]\n"
        );
        fs::write(&config, text).unwrap();
        // It is free at present, and the kernel gives out others first.
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = tool("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self {
            child,
            address,
            folder,
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// What it answers to this; `None` as long as it answers nobody.
    fn get(&mut self, path: &str) -> Option<Value> {
        let ended = self.child.try_wait().unwrap();
        assert_eq!(ended, None, "{}", self.log());
        let mut socket = TcpStream::connect(&self.address).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        // In one piece, as it is asked by an older protocol.
        let question = format!("GET {path} HTTP/1.0\r\n\r\n");
        socket.write_all(question.as_bytes()).ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    }

    /// The result of a query.
    fn query(&mut self, query: &str) -> Vec<Value> {
        let escaped: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let Some(answer) = self.get(&format!("/api/v1/query?query={escaped}")) else {
            return Vec::new();
        };
        if answer["status"] != "success" && answer["errorType"] == "bad_data" {
            panic!("{query}: {answer}");
        }
        answer["data"]["result"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number of each result.
fn numbers(results: &[Value]) -> Vec<f64> {
    let number = |result: &Value| result["value"][1].as_str()?.parse().ok();
    results.iter().filter_map(number).collect()
}

#[test]
fn prometheus_reads_the_page_and_answers_the_dashboard() {
    if !require_tool("prometheus") {
        return;
    }
    let rig = Rig::new();
    let limits = "--throttle=bps=1000000000,iops=1000000";
    let backend = rig.serve(&[ON_TCP, limits]);
    let mut prometheus = Prometheus::start(&address(&backend));
    let mut front_end = start_front_end(backend.socket());
    write_and_read(&mut front_end);
    let writes = "ploop_requests_total{operation=\"write\",queue=\"1\"}";
    wait_for("what was written so far", || {
        numbers(&prometheus.query(writes)) == [2.0]
    });
    write_and_read(&mut front_end);
    let increase = format!("increase({writes}[1m])");
    wait_for("what was written since", || {
        numbers(&prometheus.query(&increase))
            .iter()
            .any(|&it| it > 0.0)
    });
    assert_eq!(numbers(&prometheus.query("up{job=\"ploop\"}")), [1.0]);
    let answer = prometheus.get("/api/v1/targets").unwrap();
    let target = &answer["data"]["activeTargets"][0];
    assert_eq!(target["lastError"], "", "{target}");
    // Only the newer format tells units.
    let path = "/api/v1/targets/metadata?metric=ploop_capacity_bytes";
    let answer = prometheus.get(path).unwrap();
    assert_eq!(answer["data"][0]["unit"], "bytes", "{answer}");
    assert_eq!(answer["data"][0]["type"], "gauge", "{answer}");

    for query in queries() {
        let query = query
            .replace("$__rate_interval", "1m")
            .replace("$disk", ".*");
        assert!(!query.contains('$'), "{query}");
        if query.starts_with("label_values(") {
            continue;
        }
        let result = prometheus.query(&query);
        assert!(!result.is_empty(), "{query} has no result");
    }
    drop(front_end);
    backend.stop();
}
