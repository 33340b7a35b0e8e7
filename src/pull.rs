//! `sconce pull`: fetches and verifies what the manifests name.
