//! Series by tenant: the only ones that are made while the server runs, and so the only ones that
//! need a bound. Knows names and ids, not where they come from.

use std::sync::{Mutex, OnceLock, PoisonError};

use metrics::Counter;
use metrics_exporter_prometheus::PrometheusRecorder;

use super::metrics as table;
use super::series::counter;
use crate::request::TenantId;

/// Most tenants with series of their own. Everybody else shares one.
const NAMED_MAX: usize = 64;

/// The anonymous tenant, the named ones, and everybody else.
pub(super) const ROWS: usize = NAMED_MAX + 2;

/// Tenants by id.
#[derive(Debug)]
pub(super) struct Tenants {
    recorder: PrometheusRecorder,
    /// Filled from the front; the last is everybody else.
    rows: [OnceLock<Tenant>; ROWS],
    /// Held while a row is filled.
    filling: Mutex<()>,
}

/// One tenant's series.
#[derive(Debug)]
pub(super) struct Tenant {
    /// As a label.
    pub(super) name: String,
    /// By `metrics::OUTCOMES`.
    pub(super) requests: [Counter; 7],
    /// By `metrics::TOKENS`.
    pub(super) tokens: [Counter; 3],
}

impl Tenants {
    /// The anonymous tenant and everybody else.
    pub(super) fn new(recorder: PrometheusRecorder) -> Self {
        let tenants =
            Self { recorder, rows: [const { OnceLock::new() }; ROWS], filling: Mutex::new(()) };
        tenants.fill(0, table::ANONYMOUS);
        tenants.fill(ROWS - 1, table::UNKNOWN);
        tenants
    }

    /// The id of `name`; none when there are too many, or for the name of everybody else.
    pub(super) fn named(&self, name: &str) -> Option<TenantId> {
        if name == table::UNKNOWN {
            return None;
        }
        let _filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows = self.rows[..ROWS - 1].iter();
        let row = rows.position(|row| row.get().is_none_or(|tenant| tenant.name == name))?;
        self.fill(row, name);
        Some(TenantId(row as u32))
    }

    /// The series of `id`, or everybody else's.
    pub(super) fn of(&self, id: TenantId) -> &Tenant {
        let named = self.rows.get(id.0 as usize).and_then(OnceLock::get);
        named.or_else(|| self.rows[ROWS - 1].get()).expect("filled at the start")
    }

    /// Every tenant with its row.
    pub(super) fn all(&self) -> impl Iterator<Item = (usize, &Tenant)> {
        let rows = self.rows.iter().enumerate();
        rows.filter_map(|(row, tenant)| Some((row, tenant.get()?)))
    }

    fn fill(&self, row: usize, name: &str) {
        self.rows[row].get_or_init(|| Tenant {
            name: name.to_owned(),
            requests: table::OUTCOMES
                .map(|outcome| self.counter(&table::TENANT_REQUESTS, &[name, outcome])),
            tokens: table::TOKENS.map(|kind| self.counter(&table::TENANT_TOKENS, &[name, kind])),
        });
    }

    fn counter(&self, family: &'static table::Family, values: &[&str]) -> Counter {
        counter(&self.recorder, family, values)
    }
}
