//! An engine of encoders that answers by arithmetic, for the tests of each of their endpoints;
//! and what `dimensions` and `normalize` make of vectors.

use serde_json::json;

use super::{App, drive};
use crate::admission::testing::{done, front_with};
use crate::config::Config;
use crate::model::{EncoderCard, ModelTask};
use crate::request::{Event, Finish, Submission, Task, Text, Yield};

/// `org/vec` embeds as it is, `nest` in nested vectors of unit length, `rank` ranks, `mood` is a
/// classifier of exclusive labels, `tags` one of independent ones.
///
/// A text's numbers: its length, its first token, its last one. A token's: itself, three times.
pub(super) fn app() -> App {
    let card = EncoderCard { width: 3, pooling: "cls", ..EncoderCard::default() };
    let labels = |names: &[&str], independent| EncoderCard {
        width: names.len() as u32,
        labels: names.iter().map(|name| (*name).to_owned()).collect(),
        independent,
        ..card.clone()
    };
    let nested = EncoderCard { normalize: true, matryoshka: true, ..card.clone() };
    let (front, inbox) = front_with(
        Config::default(),
        vec![
            ("nest", ModelTask::Embed, nested),
            ("rank", ModelTask::Rerank, labels(&["LABEL_0"], true)),
            ("mood", ModelTask::Classify, labels(&["calm", "glad", "sad"], false)),
            ("tags", ModelTask::Classify, labels(&["a", "b", "c"], true)),
        ],
    );
    let widths: Vec<usize> = front
        .catalog
        .models()
        .iter()
        .map(|model| model.encoder().map_or(0, |card| card.width as usize))
        .collect();
    let (app, inbox) = App::over((front, inbox));
    drive(&app.front, inbox, move |Submission { request, sink }| {
        let Task::Encode(task) = request.task else { panic!("not for an encoder") };
        let width = widths[request.lane.0 as usize];
        for (index, Text { tokens, .. }) in task.inputs.iter().enumerate() {
            let numbers = [tokens.len() as f32, tokens[0] as f32, tokens[tokens.len() - 1] as f32];
            let values = match task.yields {
                Yield::Answer => numbers[..width].to_vec(),
                Yield::Tokens => tokens.iter().flat_map(|&token| [token as f32; 3]).collect(),
            };
            sink.send(Event::Vector { index: index as u32, values });
        }
        done(&sink, Finish::Complete, task.tokens() as u32, 0);
    });
    app
}

#[tokio::test]
async fn vectors_of_nested_models_may_be_shorter() {
    let app = app();
    let ask = async |dimensions: Option<u64>| {
        let body = json!({"model": "nest", "input": [[4, 4, 12, 3]], "dimensions": dimensions});
        let reply = app.post("/v1/embeddings", body.to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let vector = reply.json()["data"][0]["embedding"].clone();
        vector.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<f64>>()
    };
    // Its numbers are 4, 4, 3.
    let whole = ask(None).await;
    let length = 41f64.sqrt();
    for (got, expected) in whole.iter().zip([4.0 / length, 4.0 / length, 3.0 / length]) {
        assert!((got - expected).abs() < 1e-7, "{whole:?}");
    }
    assert_eq!(whole, ask(Some(3)).await);
    let two = ask(Some(2)).await;
    assert!(two.len() == 2 && (two[0] - 0.5f64.sqrt()).abs() < 1e-7, "{two:?}");
    assert_eq!(ask(Some(1)).await, [1.0]);
}
