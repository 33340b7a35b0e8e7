//! `sconce pull`: fetches and verifies what the manifests name, and says where it lies.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::Config;
use crate::config::manifest::Manifest;
use crate::config::values::nearest;
use crate::store::ModelFiles;
use crate::store::fetch::ensure;
use crate::store::progress::Progress;
use crate::table::Table;

/// One model that could not be pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// From sysexits.h.
    pub exit_code: u8,
    /// One line.
    pub message: String,
}

/// What to pull.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Names of models; all without any.
    pub names: Vec<String>,
    /// Also lay the files out below this folder, as `models.roots` wants them: `MODEL/FILE`.
    pub to: Option<PathBuf>,
}

/// Pulls the models that are wished for, and writes a table of their files to `out`. A model
/// that fails does not keep the others from being pulled.
///
/// # Errors
/// Every model that failed.
pub fn run(
    config: &Config,
    wish: &Wish,
    progress: &Progress,
    out: &mut dyn Write,
) -> Result<(), Vec<Failed>> {
    let manifests = chosen(config, &wish.names).map_err(|failed| vec![failed])?;
    let mut table = Table::new(["MODEL", "FILE", ">BYTES", "WHERE"]);
    let mut failures = Vec::new();
    for manifest in manifests {
        let pulled = ensure(manifest, &config.models, progress)
            .map_err(|error| Failed { exit_code: error.exit_code(), message: error.to_string() });
        let laid_out = pulled.and_then(|files| match &wish.to {
            Some(root) => lay_out(manifest, &files, root),
            None => Ok(files),
        });
        match laid_out {
            Ok(files) => {
                for file in &manifest.files {
                    let Some(path) = files.path(&file.file) else { continue };
                    let (bytes, path) = (file.bytes.to_string(), path.display().to_string());
                    table.row([manifest.name.clone(), file.file.clone(), bytes, path]);
                }
            }
            Err(failed) => failures.push(failed),
        }
    }
    if !table.is_empty() {
        // Nobody reads a closed pipe; the files are there all the same.
        let _ = write!(out, "{table}");
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

/// Puts a model's files below `root`: links where that is the same disk, else copies. A file's
/// name only ever holds the whole of it.
fn lay_out(manifest: &Manifest, files: &ModelFiles, root: &Path) -> Result<ModelFiles, Failed> {
    let folder = root.join(&manifest.name);
    let place = |path: &Path, target: &Path| {
        // Processes of several containers may have the same number.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let fresh = folder.join(format!(".tmp-{}-{}", std::process::id(), since.as_nanos()));
        fs::create_dir_all(&folder)?;
        let _ = fs::remove_file(&fresh);
        // The cache may hold a link of its own (a hub's does): the content is what is wanted.
        let path = fs::canonicalize(path)?;
        fs::hard_link(&path, &fresh).or_else(|_| fs::copy(&path, &fresh).map(|_| ()))?;
        fs::rename(&fresh, target)
    };
    let mut placed = ModelFiles::default();
    for (name, path) in &files.files {
        let target = folder.join(name);
        place(path, &target).map_err(|error| Failed {
            exit_code: 73,
            message: format!("{}: cannot write {}: {error}", manifest.name, target.display()),
        })?;
        placed.files.push((name.clone(), target));
    }
    Ok(placed)
}

/// The manifests called `names`, by name or alias; all without names.
///
/// # Errors
/// A name that no model has.
pub fn chosen<'a>(config: &'a Config, names: &[String]) -> Result<Vec<&'a Manifest>, Failed> {
    if names.is_empty() {
        return Ok(config.manifests.iter().collect());
    }
    let find = |name: &String| {
        let called = |manifest: &&Manifest| {
            manifest.name == *name || manifest.aliases.iter().any(|alias| alias == name)
        };
        config.manifests.iter().find(called).ok_or_else(|| unknown(config, name))
    };
    names.iter().map(find).collect()
}

fn unknown(config: &Config, name: &str) -> Failed {
    let known: Vec<&str> = config.manifests.iter().map(|one| one.name.as_str()).collect();
    let hint = nearest(name, known.iter().copied())
        .map(|nearest| format!(" did you mean {nearest}?"))
        .unwrap_or_default();
    let message = format!("no model is called {name:?}:{hint} the models are {}", known.join(", "));
    Failed { exit_code: 64, message }
}

#[cfg(test)]
mod tests {
    use super::{Wish, run};
    use crate::config::Config;
    use crate::config::manifest::Manifest;
    use crate::store::progress::Progress;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    /// A model whose only file is a local one that holds `abc`.
    fn manifest(name: &str, path: &std::path::Path, sha256: &str) -> Manifest {
        let text = format!(
            "name = {name:?}\naliases = [\"Alias/{name}\"]\ntask = \"embed\"\nlicense = \"MIT\"\n\
             [[files]]\nfile = \"config.json\"\nsha256 = {sha256:?}\nbytes = 3\n\
             sources = [\"file:{}\"]\n",
            path.display()
        );
        toml::from_str(&text).expect("a manifest")
    }

    #[test]
    fn the_table_names_what_is_there_and_failures_do_not_hide_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("abc");
        std::fs::write(&path, "abc").expect("a file");
        let mut config = Config::default();
        config.models.cache_dir = dir.path().join("cache");
        let wrong = "0".repeat(64);
        config.manifests = vec![manifest("bad", &path, &wrong), manifest("good", &path, ABC)];
        let pull = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let mut table = Vec::new();
            let wish = Wish { names, to: None };
            let result = run(&config, &wish, &Progress::silent(), &mut table);
            (String::from_utf8(table).expect("text"), result)
        };
        let row = format!("good   config.json      3  {}\n", path.display());
        let (table, result) = pull(&["Alias/good"]);
        assert_eq!((table, result), (format!("MODEL  FILE         BYTES  WHERE\n{row}"), Ok(())));
        let (table, result) = pull(&[]);
        assert!(table.ends_with(&row), "{table}");
        let failures = result.expect_err("bad fails");
        assert_eq!((failures.len(), failures[0].exit_code), (1, 65));
        let (table, result) = pull(&["god"]);
        let failures = result.expect_err("no such model");
        assert_eq!((table.as_str(), failures[0].exit_code), ("", 64));
        assert!(failures[0].message.contains("did you mean good?"), "{}", failures[0].message);
    }

    #[test]
    fn files_are_laid_out_as_a_root_wants_them() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("abc");
        std::fs::write(&path, "abc").expect("a file");
        let mut config = Config::default();
        config.models.cache_dir = dir.path().join("cache");
        config.manifests = vec![manifest("org/m", &path, ABC)];
        let root = dir.path().join("root");
        let wish = Wish { names: vec![], to: Some(root.clone()) };
        for _ in 0..2 {
            let mut table = Vec::new();
            run(&config, &wish, &Progress::silent(), &mut table).expect("pulled");
            let table = String::from_utf8(table).expect("text");
            assert!(table.contains(&format!("{}/org/m/config.json", root.display())), "{table}");
        }
        std::fs::remove_file(&path).expect("removed");
        config.models.roots = vec![root];
        let mut table = Vec::new();
        run(&config, &Wish::default(), &Progress::silent(), &mut table).expect("found in the root");
    }
}
