//! The OpenAPI document: the committed one, and the same routes as the routers have.

use std::collections::{BTreeMap, BTreeSet};

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::Value;

use super::auth::guarded;
use super::{App, reply};
use crate::config::Config;
use crate::http::openapi::document;

/// Methods of each path in the document, with what it says of them.
pub(super) fn documented() -> BTreeMap<String, BTreeMap<String, Value>> {
    let mut document = document();
    serde_json::from_value(document["paths"].take()).unwrap()
}

/// `UPDATE_GOLDEN=1 cargo test --lib openapi` writes it anew.
#[test]
fn the_committed_document_is_this_one() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/openapi.json");
    let shown = serde_json::to_string_pretty(&document()).unwrap() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &shown).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(shown == committed, "{path} differs; UPDATE_GOLDEN=1 writes it anew");
}

#[tokio::test]
async fn it_is_served_to_callers() {
    let (config, _folder) = guarded("");
    assert_eq!(App::new(config).0.get("/openapi.json").await.status, 401);
    let (app, _inbox) = App::new(Config::default());
    let served = app.get("/openapi.json").await;
    assert_eq!((served.status.as_u16(), served.header("content-type")), (200, "application/json"));
    assert_eq!(served.json(), document());
}

/// Every path of a router, which shows them only in its `Debug`.
fn patterns(router: &Router) -> BTreeSet<String> {
    let shown = format!("{router:?}");
    let routes = shown.split("fallback_router").next().unwrap();
    let quoted = routes.split("RouteId(").filter_map(|rest| rest.split_once("): \""));
    let paths = quoted.filter(|(id, _)| id.bytes().all(|byte| byte.is_ascii_digit()));
    paths.map(|(_, rest)| rest.split('"').next().unwrap().to_owned()).collect()
}

/// Whether a path of the document is one of `pattern`.
fn fits(path: &str, pattern: &str) -> bool {
    match pattern.split_once("{*") {
        Some((start, _)) => path.starts_with(start),
        None => path == pattern,
    }
}

/// Methods that `path` takes, by what it says to one that it does not.
async fn methods(router: &Router, path: &str) -> BTreeSet<String> {
    let path = path.replace("{*", "").replace('}', "");
    let request = Request::builder().method(Method::TRACE).uri(&path).body(Body::empty()).unwrap();
    let refused = reply(router.clone(), request).await;
    assert_eq!(refused.status, 405, "{path}");
    let allowed = refused.header("allow").split(',').map(str::to_ascii_lowercase);
    allowed.filter(|method| method != "head").collect()
}

#[tokio::test]
async fn it_has_the_routes_of_the_routers() {
    let (app, _inbox) = App::new(Config::default());
    let documented = documented();
    let mut routed = BTreeMap::<&str, BTreeSet<String>>::new();
    for (router, least) in [(&app.main, 20), (&app.admin, 6)] {
        let patterns = patterns(router);
        assert!(patterns.len() >= least, "{patterns:?}");
        for pattern in &patterns {
            let taken = methods(router, pattern).await;
            let paths = documented.keys().filter(|path| fits(path, pattern));
            // One router pattern can stand for several paths of the document.
            let mut said = BTreeSet::new();
            for path in paths {
                said.extend(documented[path].keys().cloned());
                routed.entry(path).or_default().extend(taken.iter().cloned());
            }
            assert!(taken.is_subset(&said), "{pattern} takes {taken:?}, not only {said:?}");
        }
    }
    for (path, operations) in &documented {
        let said: BTreeSet<String> = operations.keys().cloned().collect();
        let taken = routed.get(path.as_str()).unwrap_or_else(|| panic!("no route for {path}"));
        assert!(said.is_subset(taken), "{path}: {said:?} documented, {taken:?} served");
    }
}

/// What is said of keys is what the layers do.
#[tokio::test]
async fn it_says_who_needs_a_key() {
    let (config, _folder) = guarded("");
    let (app, _inbox) = App::new(config);
    for (path, operations) in documented() {
        for (method, operation) in operations {
            let at = path.replace("{model}", "tiny").replace("{version}", "1");
            let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes()).unwrap();
            let on_admin = operation.get("servers").is_some();
            let request = Request::builder().method(method).uri(&at).body(Body::empty()).unwrap();
            let router = if on_admin { &app.admin } else { &app.main };
            let status = reply(router.clone(), request).await.status.as_u16();
            let open = operation["security"] == Value::Array(vec![]);
            assert_eq!(open, status != 401, "{path}: {status}");
            let said = operation["responses"].get(status.to_string());
            assert!(said.is_some(), "{path}: {status} is not documented");
        }
    }
}
