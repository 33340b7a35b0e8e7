//! The HTTP front: routes, wire types, error mapping. Knows the engine only as an inbox.
