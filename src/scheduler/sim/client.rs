//! What one request of the simulation asked for, and what it was told.

use super::device::{Alone, logprobs, vector};
use crate::error::ErrorKind;
use crate::request::{Event, Finish, Micros, Request, Task, Text, TokenId, Usage, Yield};

/// A request and its answer so far.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) request: Request,
    pub(super) layers: u32,
    pub(super) cancelled: bool,
    /// How it ended.
    pub(super) end: Option<End>,
    /// Cached tokens, said when it came to the device.
    started: Option<u32>,
    tokens: Vec<TokenId>,
    vectors: Vec<bool>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Done(Finish, Usage),
    Failed(ErrorKind),
}

impl Client {
    pub(super) fn new(request: Request, layers: u32) -> Self {
        let inputs = match &request.task {
            Task::Generate(_) => 0,
            Task::Encode(encode) => encode.inputs.len(),
        };
        let vectors = vec![false; inputs];
        let (started, tokens) = (None, Vec::new());
        Self { request, layers, cancelled: false, end: None, started, tokens, vectors }
    }

    /// Takes in one event.
    pub(super) fn hear(&mut self, now: Micros, event: Event) {
        let id = self.request.id.0;
        assert!(!self.cancelled, "request {id} was cancelled and is told {event:?}");
        assert!(self.end.is_none(), "request {id} is over and is told {event:?}");
        match event {
            Event::Started { cached_tokens } => {
                assert!(self.started.replace(cached_tokens).is_none() && self.tokens.is_empty());
            }
            Event::Token(token) => {
                assert!(self.started.is_some() && !self.asks_logprobs());
                self.tokens.push(token);
            }
            Event::Scored { token, logprobs: told } => {
                assert!(self.started.is_some() && self.asks_logprobs());
                assert_eq!(*told, logprobs(token));
                self.tokens.push(token);
            }
            Event::Vector { index, values } => {
                let Task::Encode(task) = &self.request.task else { panic!("not an encoding") };
                let Text { tokens, second } = &task.inputs[index as usize];
                assert_eq!(values, vector(tokens, *second, task.yields == Yield::Tokens));
                assert!(!std::mem::replace(&mut self.vectors[index as usize], true));
            }
            Event::Done { finish, usage } => {
                self.end = Some(End::Done(finish, usage));
                self.check_answer(finish, usage);
            }
            Event::Failed(error) => {
                if error.kind() == ErrorKind::DeadlineExceeded {
                    assert!(self.request.deadline.is_some_and(|deadline| deadline <= now));
                    assert!(self.tokens.is_empty() && !self.vectors.contains(&true));
                }
                self.end = Some(End::Failed(error.kind()));
                self.check_beginning();
            }
        }
    }

    /// Whether anything is still to come.
    pub(super) fn is_open(&self) -> bool {
        self.end.is_none() && !self.cancelled
    }

    fn check_answer(&self, finish: Finish, usage: Usage) {
        let Task::Generate(task) = &self.request.task else {
            assert_eq!(finish, Finish::Complete);
            assert!(self.vectors.iter().all(|&told| told));
            return;
        };
        let mut alone = Alone::new(self.layers, task);
        let mut expected = Vec::new();
        let mut end = Finish::Length;
        while expected.len() < task.max_tokens as usize {
            let token = alone.next();
            if task.stop_tokens.contains(&token) {
                end = Finish::Stop;
                break;
            }
            expected.push(token);
        }
        assert_eq!(self.tokens, expected, "request {}", self.request.id.0);
        assert_eq!(finish, end);
        assert_eq!(usage.prompt_tokens as usize, task.prompt.len());
        assert_eq!(usage.generated_tokens as usize, expected.len());
        assert!(usage.cached_tokens < usage.prompt_tokens);
        assert_eq!(self.started, Some(usage.cached_tokens));
    }

    fn asks_logprobs(&self) -> bool {
        matches!(&self.request.task, Task::Generate(task) if task.detail.logprobs.is_some())
    }

    fn check_beginning(&self) {
        if let Task::Generate(task) = &self.request.task {
            let mut alone = Alone::new(self.layers, task);
            self.tokens.iter().for_each(|&token| assert_eq!(token, alone.next()));
        }
    }
}
