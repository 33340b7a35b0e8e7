//! The README's commands, run as they stand, only with this test's ports in place of the default
//! ones.

use std::path::Path;
use std::process::Command;

use crate::server::Server;

/// Every `$ PROGRAM …` of the README, continuation lines and all.
pub(crate) fn commands(program: &str) -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let mut commands: Vec<String> = Vec::new();
    for block in text.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => commands.push(command.to_owned()),
                None => {
                    let last = commands.last_mut().expect("a block starts with a command");
                    last.push('\n');
                    last.push_str(line);
                }
            }
        }
    }
    commands.retain(|command| command.starts_with(&format!("{program} ")));
    commands
}

#[test]
fn every_command_of_the_readme_works() {
    let server = Server::start(&[]);
    let commands = commands("curl");
    assert!(commands.len() >= 7, "{commands:?}");
    for command in commands {
        let here = command
            .replace("http://localhost:8080", &server.url(""))
            .replace("http://localhost:9464", &server.admin_url(""))
            .replacen("curl ", "curl --silent --show-error --fail ", 1);
        let output = Command::new("sh").args(["-c", &here]).output().expect("a shell");
        let text = String::from_utf8_lossy(&output.stdout);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}\n{text}\n{told}");
        let expected = if command.contains("\"stream\": true") {
            "data: [DONE]"
        } else if command.contains("chat/completions") {
            "chat.completion"
        } else if command.contains("embeddings") {
            "\"embedding\""
        } else if command.contains("/metrics") {
            "sconce_queue_depth 0"
        } else {
            "{"
        };
        assert!(text.contains(expected), "{command} printed no {expected}:\n{text}");
    }
}
