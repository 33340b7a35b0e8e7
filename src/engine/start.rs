//! From manifests to an engine that is ready to run: fetch, open, plan memory, load, warm up.
//! Knows models and the device; who asks for it and who listens is `serve.rs`'s business.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arch::Outline;
use crate::catalog::{Catalog, Model};
use crate::config::manifest::Manifest;
use crate::config::{Config, DeviceKind};
use crate::device::cuda::fault::{Fault, GpuError};
use crate::device::cuda::{Gpu, GpuInfo};
use crate::device::memory;
use crate::device::threads::Team;
use crate::engine::board;
use crate::engine::budget::{self, Ledger, Pages, Wish};
use crate::engine::faults;
use crate::engine::gpu_runner::{self, GPU_SLOTS, GpuRunner};
use crate::engine::lanes::Lanes;
use crate::engine::later::Later;
use crate::engine::model_runner::ModelRunner;
use crate::engine::residency::{self, LoadedModel, OpenedModel};
use crate::engine::runner::{Runner, StepError, StepErrorKind};
use crate::engine::texts;
use crate::engine::warmup::{self, Scratch, Trial};
use crate::engine::{Machine, panic_text};
use crate::kernels::builder::Capacity;
use crate::kernels::cpu::executor::Executor;
use crate::kernels::cpu::isa::SetKind;
use crate::kernels::cuda::executor::Options;
use crate::lifecycle::Lifecycle;
use crate::model::{Dtype, EncoderCard, ModelState, ModelTask};
use crate::request::{LaneId, Micros};
use crate::scheduler::{LaneKind, Scheduler, SchedulerConfig};
use crate::store::ModelFiles;
use crate::store::error::StoreError;
use crate::store::fetch::ensure_timed;
use crate::store::progress::Progress;
use crate::telemetry::Telemetry;
use crate::weights::LoadError;

/// How long a step may take, unless the configuration says so: what a token of one model waits for
/// the work of another. Then, how long while nobody waits for a next token.
const CPU_TARGETS: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(100)];
const GPU_TARGETS: [Duration; 2] = [Duration::from_millis(8), Duration::from_millis(25)];

/// Execution slots of a CPU, and uncommitted steps a slot: it computes while it is asked.
pub const CPU_SLOTS: (u8, u8) = (1, 1);

/// How long a step may take before the device counts as hung: one that shares its processor with
/// others is slower than any step on a GPU.
const CPU_PATIENCE: Duration = Duration::from_secs(120);
const GPU_PATIENCE: Duration = Duration::from_secs(30);

/// What a step of a model that has never run is taken to cost.
const COST_GUESS: (Micros, Micros) = (Micros(2_000), Micros(200));

/// How long a model whose files are there is expected to take.
const LOAD_GUESS: Duration = Duration::from_secs(2);

/// How fast a model is expected to come: a slow package registry, for `Retry-After`.
const FETCH_BYTES_A_SECOND: u64 = 20 << 20;

/// What starting needs.
#[derive(Debug, Clone)]
pub struct Startup {
    /// Frozen.
    pub config: Arc<Config>,
    /// Gets texts and states.
    pub catalog: Arc<Catalog>,
    /// Gets times.
    pub telemetry: Arc<Telemetry>,
    /// Tells early requests when to come back.
    pub lifecycle: Arc<Lifecycle>,
}

/// An engine's parts, ready to run, and the models that come later.
pub struct Started {
    /// Knows all lanes.
    pub scheduler: Scheduler,
    /// Has the models that were marked `preload`.
    pub machine: Machine,
    /// How long a step may take before the device counts as hung.
    pub patience: Duration,
    /// The others: opened, not loaded.
    pub later: Vec<Later>,
    /// What they run on.
    pub device: Opened,
}

/// The device, for people.
#[derive(Debug, Clone)]
pub struct Opened {
    /// A GPU's name, or `cpu` and the kernels in use.
    pub name: String,
    /// Compute threads of a CPU.
    pub threads: Option<usize>,
    /// Bytes that may be used.
    pub memory_limit: u64,
}

/// Why there is nothing to serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Files are missing.
    #[error(transparent)]
    Fetch(#[from] StoreError),
    /// A model cannot be used.
    #[error("model '{model}': {source}")]
    Load {
        /// Its name.
        model: String,
        /// Why.
        source: LoadError,
    },
    /// A model's tokenizer or template cannot be used.
    #[error("model '{model}': {what}")]
    Text {
        /// Its name.
        model: String,
        /// Why.
        what: String,
    },
    /// A model fails its first step.
    #[error("model '{model}' cannot run: {source}")]
    WarmUp {
        /// Its name.
        model: String,
        /// Why.
        source: StepError,
    },
    /// The models do not fit.
    #[error("{0}")]
    Memory(String),
    /// The system refuses threads or memory.
    #[error("the device cannot be opened: {0}")]
    Device(#[from] std::io::Error),
    /// There is no usable GPU, or it failed.
    #[error("the GPU cannot be used: {0}")]
    Gpu(#[from] GpuError),
    /// A defect of ours.
    #[error("loading panicked: {0}")]
    Panic(String),
}

/// One lane on its way.
struct Opening {
    opened: OpenedModel,
    wish: Wish,
    lane: (Outline, Capacity),
    preload: bool,
}

impl Startup {
    /// Does it all; takes seconds, and minutes when models must be fetched.
    ///
    /// # Errors
    /// The first thing that keeps the server from serving what it was told to.
    pub fn start(&self, progress: &Progress) -> Result<Started, StartError> {
        let load = AssertUnwindSafe(|| self.start_all(progress));
        catch_unwind(load)
            .unwrap_or_else(|panic| Err(StartError::Panic(panic_text(&*panic).to_owned())))
    }

    fn start_all(&self, progress: &Progress) -> Result<Started, StartError> {
        let mut gpu = self.open_gpu()?;
        let dtypes = self.dtypes(gpu.is_some())?;
        let slots = if gpu.is_some() { GPU_SLOTS } else { CPU_SLOTS };
        let usual = if gpu.is_some() { GPU_TARGETS } else { CPU_TARGETS };
        let targets = self.config.scheduler.step_target.map_or(usual, |target| [target; 2]);
        let files = self.fetch(progress)?;
        let mut lanes = Vec::new();
        for (((manifest, model), files), dtype) in self.models().zip(&files).zip(dtypes) {
            lanes.push(self.open((manifest, dtype, gpu.is_some()), model, files)?);
        }
        let loaded = self.load(&lanes)?;
        let (pages, memory_limit) = self.cut_memory(&lanes, &loaded, gpu.as_deref_mut())?;
        let device = self.describe(gpu.as_deref(), memory_limit);
        let usual = if gpu.is_some() { GPU_PATIENCE } else { CPU_PATIENCE };
        let patience = self.config.device.stall.unwrap_or(usual);
        let mut runner = self.runner(lanes.len(), pages, gpu)?;
        let (scheduler, tried) =
            match self.assemble(&lanes, loaded, pages, (&mut *runner, slots, targets)) {
                Ok(assembled) => assembled,
                Err(error) => {
                    // Giving memory back would wait for a device that may never answer again.
                    std::mem::forget(runner);
                    return Err(error);
                }
            };
        let machine = Machine { runner, lanes: tried, slots };
        let later = lanes.into_iter().enumerate().filter(|(_, lane)| !lane.preload);
        let later = later.map(|(index, lane)| Later {
            lane: LaneId(index as u16),
            opened: lane.opened,
            capacity: lane.lane.1,
        });
        Ok(Started { scheduler, machine, patience, later: later.collect(), device })
    }

    pub(super) fn set_state(&self, model: &Model, state: ModelState) {
        model.set_state(state);
        self.telemetry.model_state(model.lane, state);
    }

    fn models(&self) -> impl Iterator<Item = (&Manifest, &Model)> {
        self.config.manifests.iter().zip(self.catalog.models())
    }

    /// How each model's float weights are kept: known before a file is fetched.
    fn dtypes(&self, gpu: bool) -> Result<Vec<Dtype>, StartError> {
        let of = |(manifest, model): (&Manifest, &Model)| match gpu {
            true => gpu_runner::dtype(manifest.dtype)
                .map_err(|source| StartError::Load { model: model.name.clone(), source }),
            false => Ok(manifest.dtype),
        };
        self.models().map(of).collect()
    }

    /// All files of all models, fetched side by side.
    fn fetch(&self, progress: &Progress) -> Result<Vec<ModelFiles>, StoreError> {
        let eta = |manifest: &Manifest| {
            LOAD_GUESS + Duration::from_secs(manifest.bytes() / FETCH_BYTES_A_SECOND)
        };
        let longest = self.config.manifests.iter().map(eta).max().unwrap_or_default();
        self.lifecycle.set_eta(longest);
        let fetch = |manifest: &Manifest, model: &Model| {
            self.set_state(model, ModelState::Fetching);
            model.set_eta(eta(manifest));
            let started = Instant::now();
            let (files, verifying) = ensure_timed(manifest, &self.config.models, progress)?;
            model.set_eta(LOAD_GUESS);
            let fetching = started.elapsed().saturating_sub(verifying);
            self.telemetry.stage_finished(model.lane, "fetch", fetching);
            self.telemetry.stage_finished(model.lane, "verify", verifying);
            Ok(files)
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = self
                .models()
                .map(|(manifest, model)| scope.spawn(move || fetch(manifest, model)))
                .collect();
            let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            workers.into_iter().map(join).collect()
        })
    }

    /// Reads the header and the tokenizer: from then on requests can be checked and queued.
    fn open(
        &self,
        (manifest, dtype, on_gpu): (&Manifest, Dtype, bool),
        model: &Model,
        files: &ModelFiles,
    ) -> Result<Opening, StartError> {
        let name = || model.name.clone();
        self.set_state(model, ModelState::Loading);
        let opened = residency::open(files)
            .map_err(|source| StartError::Load { model: name(), source })?
            .with_dtype(dtype, (!on_gpu).then(SetKind::detect));
        // A classifier of one label scores whatever it was trained for.
        let scores = (opened.outline.task, model.task) == (ModelTask::Rerank, ModelTask::Classify);
        if opened.outline.task != model.task && !scores {
            let (says, is) = (model.task.as_str(), opened.outline.task.as_str());
            let what = format!("its manifest says task '{says}', its files are for '{is}'");
            return Err(StartError::Text { model: name(), what });
        }
        let text =
            texts::read(&opened, files).map_err(|what| StartError::Text { model: name(), what })?;
        let rows = match &opened.card {
            Some(card) => card.vocab as usize,
            None => opened.outline.output_width,
        };
        let tokens = text.tokenizer.vocab_size();
        if tokens > rows {
            let what = format!("its tokenizer has {tokens} tokens, its embedding {rows} rows");
            return Err(StartError::Text { model: name(), what });
        }
        let wish = Wish {
            weight: manifest.weight,
            context: manifest.limits.context,
            seats: manifest.limits.seats,
            weight_bytes: opened.weight_bytes(),
        };
        let capacity = if on_gpu { budget::capacity_on_gpu } else { budget::capacity };
        let capacity = capacity(&opened.outline, &wish);
        if let Some(card) = &opened.card {
            model.set_encoder(EncoderCard { matryoshka: manifest.matryoshka, ..card.clone() });
        }
        model.set_text(text, capacity.context as u32);
        let lane = (opened.outline, capacity);
        Ok(Opening { opened, wish, lane, preload: manifest.preload })
    }

    /// The programs of the models that are wanted at once; none for the others.
    fn load(&self, lanes: &[Opening]) -> Result<Vec<Option<LoadedModel>>, StartError> {
        self.lifecycle.set_eta(LOAD_GUESS);
        let mut loaded = Vec::new();
        for (lane, model) in lanes.iter().zip(self.catalog.models()) {
            if !lane.preload {
                loaded.push(None);
                continue;
            }
            // The device waits for these weights: that is load time, not idle time.
            let held = self.telemetry.occupy();
            let started = Instant::now();
            let ready = self
                .timed_load(model, &lane.opened, lane.lane.1)
                .map_err(|source| StartError::Load { model: model.name.clone(), source })?;
            loaded.push(Some(ready));
            self.telemetry.load_finished(model.lane, started.elapsed().into());
            drop(held);
        }
        Ok(loaded)
    }

    pub(super) fn timed_load(
        &self,
        model: &Model,
        opened: &OpenedModel,
        capacity: Capacity,
    ) -> Result<LoadedModel, LoadError> {
        let started = Instant::now();
        let loaded = opened.load(capacity)?;
        let elapsed = started.elapsed();
        self.telemetry.stage_finished(model.lane, "load", elapsed);
        tracing::info!(
            model = model.name,
            milliseconds = elapsed.as_millis() as u64,
            weights = budget::mib(opened.weight_bytes()),
            context = capacity.context,
            "model loaded"
        );
        Ok(loaded)
    }

    /// Decides what memory is for, once; also says how much there is in all.
    fn cut_memory(
        &self,
        lanes: &[Opening],
        loaded: &[Option<LoadedModel>],
        gpu: Option<&mut (dyn Gpu + 'static)>,
    ) -> Result<(Pages, u64), StartError> {
        let programs = loaded.iter().flatten().map(|model| &*model.program);
        let on_gpu = gpu.is_some();
        let weights: u64 = lanes.iter().map(|lane| lane.wish.weight_bytes).sum();
        let (device, workspace) = match gpu {
            // Each lane has its own.
            Some(gpu) => {
                let own: u64 = programs.map(gpu_runner::workspace_bytes).sum();
                let workspace = own + gpu_runner::shared_bytes(gpu.info());
                let (total, free) = (gpu.info().memory, gpu.free_bytes()?);
                (budget::Device { total, free, strict: true }, workspace)
            }
            // One for all, and weights are there already.
            None => {
                let total = memory::total().unwrap_or(u64::MAX);
                let free = memory::available().unwrap_or(u64::MAX).saturating_add(weights);
                let workspace = programs.map(|program| program.workspace_bytes as u64).max();
                (budget::Device { total, free, strict: false }, workspace.unwrap_or(0))
            }
        };
        let asked = self.config.device.memory_limit;
        let limit = device.limit(asked).map_err(StartError::Memory)?;
        let mut ledger = Ledger { weights, kv: 0, workspace, limit, others: device.others() };
        let shapes: Vec<_> = lanes.iter().map(|lane| lane.lane).collect();
        let by_default = on_gpu.then(|| budget::kv_of_a_gpu(ledger));
        let kv = self.config.scheduler.kv_bytes.or(by_default);
        let pages = budget::pages(&shapes, kv, ledger).map_err(StartError::Memory)?;
        ledger.kv = u64::from(pages.count + pages.scratch) * pages.page_bytes as u64;
        let Ledger { weights, kv, workspace, limit, .. } = ledger;
        self.telemetry.memory(weights, kv, workspace, limit);
        self.telemetry.kv_limit(pages.count);
        Ok((pages, limit))
    }

    fn describe(&self, gpu: Option<&dyn Gpu>, memory_limit: u64) -> Opened {
        let (name, threads) = match gpu {
            Some(gpu) => (gpu.info().name.clone(), None),
            None => (format!("cpu ({})", SetKind::detect().as_str()), Some(self.threads())),
        };
        Opened { name, threads, memory_limit }
    }

    fn threads(&self) -> usize {
        self.config.cpu.threads.unwrap_or_else(crate::device::cpu::threads_available)
    }

    /// The GPU, if this process is to use one.
    fn open_gpu(&self) -> Result<Option<Box<dyn Gpu>>, StartError> {
        if self.config.device.kind == DeviceKind::Cpu {
            return Ok(None);
        }
        match gpu_runner::open() {
            Ok(gpu) => {
                let GpuInfo { name, uuid, memory, .. } = gpu.info();
                tracing::info!(name, uuid, memory = budget::mib(*memory), "GPU opened");
                board::watch(gpu.info(), Arc::clone(&self.telemetry))?;
                Ok(Some(gpu))
            }
            Err(error) if self.config.device.kind == DeviceKind::Auto => {
                match error.fault {
                    Fault::Absent => tracing::debug!(reason = error.name, "no GPU"),
                    Fault::Outdated => tracing::warn!(reason = error.name, "the GPU is not used"),
                    // A GPU that is there and fails is not passed over in silence.
                    _ => return Err(error.into()),
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What runs steps: the GPU, else the processor.
    fn runner(
        &self,
        lanes: usize,
        pages: Pages,
        gpu: Option<Box<dyn Gpu>>,
    ) -> Result<Box<dyn Runner>, StartError> {
        let Pages { count, scratch, page_bytes } = pages;
        let count = count + scratch;
        if let Some(gpu) = gpu {
            let deterministic = self.config.device.deterministic;
            let options = Options { pages: count, page_bytes, lanes, deterministic };
            return Ok(faults::scripted(Box::new(GpuRunner::new(gpu, options)?)));
        }
        let executor = Executor::new(Team::new(self.threads())?, SetKind::detect());
        Ok(faults::scripted(Box::new(ModelRunner::new(executor, lanes, (count, page_bytes))?)))
    }

    /// Installs the models and runs their first steps.
    fn assemble(
        &self,
        lanes: &[Opening],
        loaded: Vec<Option<LoadedModel>>,
        pages: Pages,
        (runner, slots, targets): (&mut dyn Runner, (u8, u8), [Duration; 2]),
    ) -> Result<(Scheduler, Lanes), StartError> {
        let scratch = Scratch { first: pages.count };
        let (mut configs, mut tried) = (Vec::new(), Vec::new());
        for ((opening, model), loaded) in lanes.iter().zip(self.catalog.models()).zip(loaded) {
            let Opening { lane, wish, .. } = opening;
            let mut config = budget::lane_config(lane, wish, pages.page_bytes, COST_GUESS);
            if let LaneKind::Generate { layers, blocks_per_page, .. } = config.kind {
                self.telemetry.kv_layout(model.lane, layers, blocks_per_page);
            }
            let trial = Trial { lane: model.lane, config: config.clone(), context: lane.1.context };
            let preloaded = loaded.is_some();
            if let Some(loaded) = loaded {
                let held = self.telemetry.occupy();
                let started = Instant::now();
                let installed = runner.install(model.lane, loaded);
                installed.map_err(|source| match source.kind {
                    StepErrorKind::Memory => StartError::Memory(source.to_string()),
                    _ => StartError::WarmUp { model: model.name.clone(), source },
                })?;
                config.cost = self.warm_up(runner, model, (&trial, scratch))?;
                self.telemetry.load_finished(model.lane, started.elapsed().into());
                drop(held);
                self.set_state(model, ModelState::Ready);
            }
            tried.push((trial, preloaded));
            configs.push(config);
        }
        let [step_target, quiet_target] = targets.map(Micros::from);
        let config = SchedulerConfig {
            step_target,
            quiet_target,
            slots: slots.0,
            depth: slots.1,
            kv_pages: pages.count,
        };
        Ok((Scheduler::new(config, configs), Lanes::new(tried, scratch)))
    }

    fn warm_up(
        &self,
        runner: &mut dyn Runner,
        model: &Model,
        (trial, scratch): (&Trial, Scratch),
    ) -> Result<(Micros, Micros), StartError> {
        let started = Instant::now();
        let cost = warmup::measure(runner, trial, scratch)
            .map_err(|source| StartError::WarmUp { model: model.name.clone(), source })?;
        self.telemetry.stage_finished(model.lane, "warm", started.elapsed());
        let (fixed, row) = (cost.0.0, cost.1.0);
        tracing::debug!(model = model.name, fixed, row, "first step cost in microseconds");
        Ok(cost)
    }
}
