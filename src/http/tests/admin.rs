//! Models, probes, and the admin listener's paths.

use std::net::SocketAddr;

use axum::body::Body;
use axum::http::Request;
use serde_json::json;

use super::App;
use crate::admission::testing::advance;
use crate::config::Config;
use crate::error::Error;
use crate::http::connection::Peer;
use crate::lifecycle::Phase;
use crate::request::{LaneId, Micros};
use crate::scheduler::{LaneLoad, Load};

fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

fn drain(query: &str, peer: Option<&str>) -> Request<Body> {
    let mut request = Request::post(format!("/drain{query}")).body(Body::empty()).unwrap();
    if let Some(peer) = peer {
        request.extensions_mut().insert(Peer::Address(peer.parse::<SocketAddr>().unwrap()));
    }
    request
}

#[tokio::test]
async fn models_by_list_and_by_name() {
    let (app, _inbox) = App::new(Config::default());
    let list = app.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(
        list["data"][1],
        json!({"id": "org/vec", "object": "model", "created": 1_700_000_000_u64,
               "owned_by": "tests", "max_model_len": 16})
    );
    for path in ["/v1/models/org/vec", "/v1/models/org%2Fvec"] {
        assert_eq!(app.get(path).await.json()["id"], "org/vec");
    }
    assert_eq!(app.get("/v1/models/gpt-x").await.json()["id"], "tiny");
    let missing = app.get("/v1/models/org/nothing").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.json()["error"]["code"], "model_not_found");
}

#[tokio::test]
async fn probes_follow_the_phase_and_the_engine() {
    let (app, inbox) = App::new(Config::default());
    let status = async |path: &str| app.get(path).await.status.as_u16();
    for (phase, live, ready) in [
        (Phase::Loading, 200, 503),
        (Phase::Ready, 200, 200),
        (Phase::LameDuck, 200, 503),
        (Phase::Draining, 200, 503),
        (Phase::Drained, 200, 503),
        (Phase::Closing, 200, 503),
        (Phase::Stopped, 503, 503),
    ] {
        advance(&app.front.lifecycle, phase);
        for path in ["/livez", "/v2/health/live"] {
            assert_eq!(status(path).await, live, "{path} {phase:?}");
        }
        for path in ["/readyz", "/health"] {
            assert_eq!(status(path).await, ready, "{path} {phase:?}");
        }
        assert_eq!(app.admin(get("/livez")).await.status.as_u16(), live);
        assert_eq!(app.admin(get("/readyz")).await.status.as_u16(), ready);
        assert_eq!(status("/v2/models/org/vec/ready").await, ready);
    }
    advance(&app.front.lifecycle, Phase::Ready);
    assert_eq!(status("/v2/models/late/ready").await, 503);
    assert_eq!(status("/v2/models/nothing/ready").await, 404);
    let readiness = app.admin(get("/readyz")).await.json();
    assert_eq!(readiness["phase"], "ready");
    // No manifests here, so no files and no bytes.
    let late = json!({"state": "loading", "bytes": 0, "eta_seconds": 7.0});
    assert_eq!(readiness["models"]["late"], late);
    let tiny = json!({"state": "ready", "bytes": 0, "eta_seconds": null});
    assert_eq!(readiness["models"]["tiny"], tiny);
    drop(inbox);
    assert_eq!(status("/livez").await, 503);
    assert_eq!(status("/readyz").await, 503);
}

#[tokio::test]
async fn stats_are_stable_and_zero_for_scalers_when_not_accepting() {
    let (app, _inbox) = App::new(Config::default());
    let lane = LaneLoad {
        waiting: 3,
        waiting_tokens: 40,
        waiting_work: Micros(1_500_000),
        running: 2,
        ..LaneLoad::default()
    };
    app.front.telemetry.publish(&Load { lanes: vec![lane], kv_usage: 0.25, ..Load::default() });
    app.front.telemetry.submitted(LaneId(0), 10);
    app.front.telemetry.in_flight(6);
    let stats = app.admin(get("/stats")).await.json();
    assert_eq!(
        stats,
        json!({
            "schema": 1,
            "phase": "ready",
            "scaling": {"queue": 4, "in_flight": 6},
            "queue": {"requests": 4, "tokens": 50, "work_seconds": 1.5, "oldest_age_seconds": 0.0,
                      "running": 2, "in_flight": 6, "kv_usage_ratio": 0.25},
            "models": {
                "tiny": {"task": "generate", "state": "ready", "requests": 3, "tokens": 40,
                         "work_seconds": 1.5, "running": 2},
                "org/vec": {"task": "embed", "state": "ready", "requests": 0, "tokens": 0,
                            "work_seconds": 0.0, "running": 0},
                "late": {"task": "generate", "state": "loading", "requests": 0, "tokens": 0,
                         "work_seconds": 0.0, "running": 0},
            }
        })
    );
    for phase in [Phase::Loading, Phase::Draining, Phase::Drained, Phase::Closing] {
        advance(&app.front.lifecycle, phase);
        let stats = app.admin(get("/stats")).await.json();
        assert_eq!(stats["scaling"], json!({"queue": 0, "in_flight": 0}), "{phase:?}");
        assert_eq!(stats["queue"]["in_flight"], 6);
    }
    app.front.telemetry.in_flight(-6);
}

#[tokio::test]
async fn metrics_are_on_the_admin_side_unless_wanted() {
    let (app, _inbox) = App::new(Config::default());
    app.post("/v1/embeddings", "{").await;
    let reply = app.admin(get("/metrics")).await;
    assert_eq!(reply.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    assert!(reply.body.contains("sconce_requests_total"), "{}", reply.body);
    assert_eq!(app.get("/metrics").await.status, 404);
    let mut config = Config::default();
    config.admin.metrics_on_main = true;
    let (app, _inbox) = App::new(config);
    assert_eq!(app.get("/metrics").await.status, 200);
    assert_eq!(app.admin(get("/metrics")).await.status, 200);
}

#[tokio::test]
async fn only_this_machine_may_start_a_drain() {
    let (app, _inbox) = App::new(Config::default());
    let state = app.admin(get("/drain")).await.json();
    assert_eq!(state, json!({"phase": "ready", "in_flight": 0, "remaining_seconds": null}));
    for refused in [None, Some("10.0.0.7:999"), Some("[2001:db8::1]:9"), Some("127.0.0.6:9")] {
        assert_eq!(app.admin(drain("", refused)).await.status, 403);
    }
    let mut page = drain("", Some("127.0.0.1:999"));
    page.headers_mut().insert("origin", "https://example.com".parse().unwrap());
    assert_eq!(app.admin(page).await.status, 403);
    for wrong in ["?deadline=soon", "?deadline=-1", "?deadline=1e9", "?deadline=nan", "?x=1"] {
        let reply = app.admin(drain(wrong, Some("127.0.0.1:999"))).await;
        assert_eq!(reply.status, 400, "{wrong}");
        assert_eq!(reply.json()["error"]["param"], "deadline");
    }
    assert_eq!(app.front.lifecycle.phase(), Phase::Ready);
    let reply = app.admin(drain("?deadline=20", Some("[::ffff:127.0.0.1]:999"))).await;
    assert_eq!(reply.status, 202);
    assert_eq!(reply.json()["phase"], "lame_duck");
    let left = reply.json()["remaining_seconds"].as_f64().unwrap();
    assert!((19.0..=20.0).contains(&left), "{left}");
    assert_eq!(reply.header("connection"), "close");
    assert_eq!(app.get("/drain").await.status, 404);
}

#[tokio::test]
async fn a_dead_engine_is_neither_alive_nor_ready_and_the_front_speaks_for_it() {
    // Hung: it holds the request, and says nothing.
    let (app, mut inbox) = App::new(Config::default());
    let waiting = {
        let main = app.main.clone();
        let body = r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}]}"#;
        tokio::spawn(super::reply(main, super::post("/v1/chat/completions", body)))
    };
    let held = inbox.recv().await.unwrap();
    app.front.lifecycle.engine_failed();
    assert_eq!(app.front.lifecycle.phase(), Phase::Closing);
    for path in ["/livez", "/readyz"] {
        assert_eq!(app.get(path).await.status, 503, "{path}");
        assert_eq!(app.admin(get(path)).await.status, 503, "{path}");
    }
    app.front.give_up(&Error::device_failed());
    let told = waiting.await.unwrap();
    assert_eq!((told.status.as_u16(), told.header("connection")), (503, "close"));
    assert_eq!(told.header("retry-after"), "1");
    assert_eq!(told.json()["error"]["code"], "device_failed");
    assert!(held.sink.is_cancelled(), "nobody listens any longer");
}
