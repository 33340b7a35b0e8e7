//! Models on their way to the device: what their files say, their program, their warm-up.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;

use crate::arch::{self, Description, Outline};
use crate::kernels::builder::Capacity;
use crate::kernels::coarse::Coarse;
use crate::kernels::cpu::isa::SetKind;
use crate::kernels::ops::Program;
use crate::model::{Dtype, EncoderCard, ModelTask};
use crate::store::ModelFiles;
use crate::store::gguf::Header;
use crate::weights::{LoadError, Weights};

/// A model's files, opened, and what they say: enough to plan memory, nothing loaded yet.
#[derive(Debug)]
pub struct OpenedModel {
    opened: Opened,
    on_gpu: bool,
    /// What it says about itself.
    pub outline: Outline,
    /// How its answers are to be read, if it is an encoder.
    pub card: Option<EncoderCard>,
}

#[derive(Debug)]
struct Opened {
    weights: Weights,
    config: Option<Json>,
    pooling: Option<Json>,
    modules: Option<Json>,
}

/// A model that can run.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// Its step.
    pub program: Arc<Program>,
    /// What it says about itself.
    pub outline: Outline,
}

/// Configuration files larger than this are not configuration.
const JSON_BYTES_MAX: u64 = 4 << 20;

const INDEX: &str = "model.safetensors.index.json";

/// Opens a model's files: `model.gguf`, or `config.json` with `model.safetensors` or with an index
/// and the files that it names.
///
/// # Errors
/// A missing file, an unusable header, an unknown architecture.
pub fn open(files: &ModelFiles) -> Result<OpenedModel, LoadError> {
    let single = files.path("model.gguf").or_else(|| files.path("model.safetensors"));
    let weights = match (single, files.path(INDEX)) {
        (Some(path), _) => Weights::open(path)?,
        (None, Some(index)) => Weights::open_index(index, |name| files.path(name).cloned())?,
        (None, None) => {
            return Err(LoadError::Shape(format!(
                "its manifest needs a file 'model.gguf', 'model.safetensors' or '{INDEX}'"
            )));
        }
    };
    let config = json(files.path("config.json"))?;
    let pooling = json(files.path("pooling.json"))?;
    let modules = json(files.path("modules.json"))?;
    if weights.gguf().is_none() && config.is_none() {
        return Err(LoadError::Shape("safetensors files need 'config.json' beside them".into()));
    }
    let opened = Opened { weights, config, pooling, modules };
    let outline = arch::outline(&opened.description())?;
    let card = arch::encoder_card(&opened.description())?;
    Ok(OpenedModel { opened, on_gpu: false, outline, card })
}

impl OpenedModel {
    /// Chooses how float weights are kept, for a processor's instructions or for a GPU;
    /// [`Dtype::Auto`] for this processor unless said.
    pub fn with_dtype(mut self, dtype: Dtype, set: Option<SetKind>) -> Self {
        self.opened.weights = self.opened.weights.with_dtype(dtype, set);
        self.on_gpu = set.is_none();
        self
    }

    /// Bytes of memory that its tensors take, and what is kept of them besides.
    pub fn weight_bytes(&self) -> u64 {
        self.opened.weights.bytes() + self.coarse_bytes()
    }

    /// Bytes of a coarse copy of a generator's head.
    fn coarse_bytes(&self) -> u64 {
        if self.on_gpu || self.outline.task != ModelTask::Generate {
            return 0;
        }
        let head = arch::head(&self.opened.weights);
        head.map_or(0, |(format, n, k)| Coarse::bytes(format, n, k) as u64)
    }

    /// Its header, if it is a GGUF file.
    pub fn gguf(&self) -> Option<&Header> {
        self.opened.weights.gguf()
    }

    /// Reads and packs the weights.
    ///
    /// # Errors
    /// Tensors that are missing, misshapen or unreadable.
    pub fn load(&self, capacity: Capacity) -> Result<LoadedModel, LoadError> {
        let weights = &self.opened.weights;
        let mut program = arch::build(&self.opened.description(), weights, capacity)?;
        if self.coarse_bytes() > 0 {
            let coarse = Coarse::of(&program);
            program.coarse = coarse.unwrap_or_else(|error| {
                tracing::warn!(%error, "no copy of the head for greedy steps");
                None
            });
        }
        Ok(LoadedModel { program: Arc::new(program), outline: self.outline })
    }
}

impl Opened {
    fn description(&self) -> Description<'_> {
        match (self.weights.gguf(), &self.config) {
            (Some(header), _) => Description::Gguf(header),
            (None, config) => Description::Json {
                config: config.as_ref().unwrap_or(&Json::Null),
                pooling: self.pooling.as_ref(),
                modules: self.modules.as_ref(),
            },
        }
    }
}

/// The content of a configuration file, if there is one.
///
/// # Errors
/// It cannot be read, or is larger than configuration is.
pub(super) fn json(path: Option<&PathBuf>) -> Result<Option<Json>, LoadError> {
    let Some(path) = path else { return Ok(None) };
    read_json(path).map(Some).map_err(|what| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        LoadError::Shape(format!("{name}: {what}"))
    })
}

fn read_json(path: &Path) -> Result<Json, String> {
    let bytes = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if bytes > JSON_BYTES_MAX {
        return Err(format!("{bytes} bytes, at most {JSON_BYTES_MAX} are read"));
    }
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}
