//! Each filter on its own, the distribution over many positions, and rows that nobody expects.

use super::*;

const DEFAULT: Sampling =
    Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 7, choice: 0 };

fn sampler() -> Sampler {
    Sampler::new(SetKind::detect(), 64)
}

/// How often each token is drawn over `count` positions.
fn histogram(logits: &[f32], sampling: Sampling, count: u32) -> Vec<u32> {
    let mut sampler = sampler();
    let mut drawn = vec![0; logits.len()];
    for position in 0..count {
        drawn[sampler.sample(logits, &sampling, position) as usize] += 1;
    }
    drawn
}

/// Tokens that are drawn at all, over many positions.
fn support(logits: &[f32], sampling: Sampling) -> Vec<usize> {
    let drawn = histogram(logits, sampling, 4000);
    (0..logits.len()).filter(|id| drawn[*id] > 0).collect()
}

/// Logits with these probabilities.
fn logits(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

#[test]
fn the_generator_gives_its_published_answers() {
    let known = [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8];
    assert_eq!(philox([0; 4], [0; 2]), known);
    let known = [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD];
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), known);
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    let greedy = Sampling { temperature: 0.0, ..DEFAULT };
    let mut row = vec![0.0; 50];
    row[17] = 2.5;
    row[33] = 2.5;
    assert_eq!(sampler().sample(&row, &greedy, 0), 17);
    row[49] = 3.0;
    assert_eq!(sampler().sample(&row, &greedy, 0), 49);
    assert_eq!(sampler().sample(&[-1.0, -1.0], &greedy, 3), 0);
}

#[test]
fn frequencies_follow_the_softmax() {
    let mut values: Vec<f32> = (0..40).map(|i| (i as f32 * 1.7).sin() * 2.0).collect();
    values.push(f32::NEG_INFINITY);
    for temperature in [0.5, 1.0, 2.0] {
        let sampling = Sampling { temperature, ..DEFAULT };
        let count = 40_000;
        let drawn = histogram(&values, sampling, count);
        let weights: Vec<f64> =
            values.iter().map(|x| (f64::from(*x) / f64::from(temperature)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let chi: f64 = drawn
            .iter()
            .zip(&weights)
            .filter(|(_, weight)| **weight > 0.0)
            .map(|(drawn, weight)| {
                let expected = weight / total * f64::from(count);
                (f64::from(*drawn) - expected).powi(2) / expected
            })
            .sum();
        // 39 degrees of freedom: above 73 once in a thousand seeds, and the seed is fixed.
        assert!(chi < 73.0, "chi² {chi} at temperature {temperature}");
        assert_eq!(drawn[40], 0);
    }
}

#[test]
fn each_draw_depends_on_seed_choice_and_position_alone() {
    let row = vec![0.0; 64];
    let draws = |seed, choice| -> Vec<TokenId> {
        let sampling = Sampling { seed, choice, ..DEFAULT };
        (0..50).map(|position| sampler().sample(&row, &sampling, position)).collect()
    };
    assert_eq!(draws(7, 0), draws(7, 0));
    assert_ne!(draws(7, 0), draws(8, 0));
    assert_ne!(draws(7, 0), draws(7, 1));
    assert_ne!(draws(7, 0), draws(7 + (1 << 32), 0));
}

#[test]
fn top_k_keeps_the_largest_and_the_lower_id_of_equals() {
    let row = [1.0, 3.0, 2.0, 3.0, 2.0, 0.0];
    let top = |top_k| support(&row, Sampling { top_k, ..DEFAULT });
    assert_eq!(top(1), [1]);
    assert_eq!(top(2), [1, 3]);
    assert_eq!(top(3), [1, 2, 3]);
    assert_eq!(top(4), [1, 2, 3, 4]);
    assert_eq!(top(6), [0, 1, 2, 3, 4, 5]);
    assert_eq!(top(1000), [0, 1, 2, 3, 4, 5]);
    // More places than tokens with any weight.
    let thin = [0.0, f32::NEG_INFINITY, -1.0, -1000.0];
    assert_eq!(support(&thin, Sampling { top_k: 3, ..DEFAULT }), [0, 2]);
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_its_share() {
    let row = logits(&[0.05, 0.5, 0.15, 0.3]);
    let top = |top_p| support(&row, Sampling { top_p, ..DEFAULT });
    assert_eq!(top(0.0), [1]);
    assert_eq!(top(0.49), [1]);
    assert_eq!(top(0.6), [1, 3]);
    assert_eq!(top(0.79), [1, 3]);
    assert_eq!(top(0.9), [1, 2, 3]);
    assert_eq!(top(0.97), [0, 1, 2, 3]);
    // Equal weights: as many as needed, lowest ids first.
    assert_eq!(support(&[0.0; 10], Sampling { top_p: 0.35, ..DEFAULT }), [0, 1, 2, 3]);
}

#[test]
fn min_p_is_relative_to_the_most_likely() {
    let row = logits(&[0.05, 0.5, 0.15, 0.3]);
    let least = |min_p| support(&row, Sampling { min_p, ..DEFAULT });
    assert_eq!(least(0.09), [0, 1, 2, 3]);
    assert_eq!(least(0.11), [1, 2, 3]);
    assert_eq!(least(0.5), [1, 3]);
    assert_eq!(least(1.0), [1]);
}

#[test]
fn filters_work_one_after_the_other() {
    let row = logits(&[0.4, 0.3, 0.2, 0.1]);
    // Of the first two, 0.56 of the weight is the first one's.
    assert_eq!(support(&row, Sampling { top_k: 2, top_p: 0.5, ..DEFAULT }), [0]);
    assert_eq!(support(&row, Sampling { top_k: 2, top_p: 0.6, ..DEFAULT }), [0, 1]);
    assert_eq!(support(&row, Sampling { top_k: 3, min_p: 0.6, ..DEFAULT }), [0, 1]);
    // The temperature comes first: it lowers the first one's share to 0.42.
    let warm = Sampling { temperature: 1000.0, top_k: 2, top_p: 0.5, ..DEFAULT };
    assert_eq!(support(&row, Sampling { top_p: 0.45, ..warm }), [0]);
    assert_eq!(support(&row, Sampling { top_p: 0.51, ..warm }), [0, 1]);
}

#[test]
fn extreme_temperatures() {
    let row = [1.0, 1.5, 1.5, -2.0];
    for temperature in [1e-3, 1e-30, f32::MIN_POSITIVE, 1e-45] {
        assert_eq!(support(&row, Sampling { temperature, ..DEFAULT }), [1, 2], "{temperature}");
    }
    for temperature in [1e10, f32::MAX, f32::INFINITY] {
        let drawn = histogram(&row, Sampling { temperature, ..DEFAULT }, 4000);
        assert!(drawn.iter().all(|drawn| (900..1100).contains(drawn)), "{temperature} {drawn:?}");
    }
    for temperature in [-1.0, f32::NAN] {
        assert_eq!(support(&row, Sampling { temperature, ..DEFAULT }), [1]);
    }
}

#[test]
fn rows_that_nobody_expects_do_not_panic() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let samplings = [
        Sampling { temperature: 0.0, ..DEFAULT },
        DEFAULT,
        Sampling { top_k: 2, top_p: 0.5, min_p: 0.1, ..DEFAULT },
        Sampling { top_k: u32::MAX, top_p: nan, min_p: nan, ..DEFAULT },
        Sampling { top_p: -3.0, min_p: 7.0, ..DEFAULT },
    ];
    for sampling in samplings {
        let choose = |row: &[f32]| sampler().sample(row, &sampling, 5);
        assert_eq!(choose(&[nan; 20]), 0);
        assert_eq!(choose(&[-inf; 33]), 0);
        assert_eq!(choose(&[]), 0);
        assert_eq!(choose(&[0.0]), 0);
        assert_eq!(choose(&[nan, -inf, 1.0, nan]), 2);
        assert_eq!(choose(&[1.0, inf, nan, inf]), 1);
        let long: Vec<f32> = (0..40).map(|i| if i == 21 { f32::MAX } else { f32::MIN }).collect();
        assert_eq!(choose(&long), 21);
        let mixed: Vec<f32> = (0..37).map(|i| if i % 3 == 0 { nan } else { i as f32 }).collect();
        assert_ne!(choose(&mixed) % 3, 0);
    }
}

#[test]
fn every_set_chooses_the_same_from_a_large_vocabulary() {
    let row: Vec<f32> = (0..49_152_u32)
        .map(|i| philox([i, 0, 0, 0], [1, 2])[0] as f32 / u32::MAX as f32 * 20.0)
        .collect();
    let samplings = [
        DEFAULT,
        Sampling { top_p: 0.9, ..DEFAULT },
        Sampling { top_k: 40, temperature: 0.7, ..DEFAULT },
        Sampling { top_k: 20_000, top_p: 0.99, min_p: 0.001, ..DEFAULT },
    ];
    let sets = SetKind::ALL.into_iter().filter(|set| set.is_supported());
    let chosen: Vec<Vec<TokenId>> = sets
        .map(|set| {
            let mut sampler = Sampler::new(set, row.len());
            let each = samplings.iter().flat_map(|sampling| (0..10).map(move |p| (sampling, p)));
            each.map(|(sampling, position)| sampler.sample(&row, sampling, position)).collect()
        })
        .collect();
    assert!(chosen.windows(2).all(|pair| pair[0] == pair[1]));
    let peak = row.iter().copied().fold(0.0, f32::max);
    let mut sorted = row.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    assert!(chosen[0][20..30].iter().all(|id| row[*id as usize] >= sorted[39]), "top 40");
    assert!(chosen[0][30..].iter().all(|id| row[*id as usize] >= peak + 0.001_f32.ln()));
}

/// What the penalties and the bias say, spelled out.
fn adjusted(row: &[f32], adjustment: &Adjustment, prompt: &[u32], answer: &[u32]) -> Vec<f32> {
    let mut row = row.to_vec();
    for &(token, bias) in &adjustment.bias {
        row[token as usize] += bias;
    }
    for (token, logit) in (0..).zip(row.iter_mut()) {
        let count = answer.iter().filter(|other| **other == token).count();
        if count > 0 || prompt.contains(&token) {
            let r = adjustment.repetition;
            *logit = if *logit > 0.0 { *logit / r } else { *logit * r };
        }
        if count > 0 {
            *logit -= adjustment.frequency * count as f32 + adjustment.presence;
        }
    }
    row
}

#[test]
fn bias_and_penalties_change_what_they_name_and_leave_nothing_behind() {
    let row: Vec<f32> = (0..50).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
    let all = Adjustment {
        bias: vec![(3, 2.5), (7, -100.0), (49, 100.0), (50, 1.0), (u32::MAX, 1.0)],
        repetition: 1.3,
        frequency: 0.7,
        presence: -0.4,
    };
    let answer = [4, 9, 4, 4, 3, 60];
    let mut adjuster = Adjuster::default();
    for adjustment in [
        Adjustment { bias: all.bias.clone(), ..Adjustment::default() },
        Adjustment { repetition: 1.3, ..Adjustment::default() },
        Adjustment { frequency: 0.7, ..Adjustment::default() },
        Adjustment { presence: -0.4, ..Adjustment::default() },
        all,
    ] {
        for (prompt, generated) in [(&[1, 4, 30, 99][..], 6), (&[], 6), (&[2, 2], 0)] {
            let generated = &answer[..generated];
            let known = Adjustment {
                bias: adjustment.bias.iter().copied().filter(|(id, _)| *id < 50).collect(),
                ..adjustment.clone()
            };
            let expected = adjusted(&row, &known, prompt, generated);
            let past = Past { prompt, generated, last: None };
            assert_eq!(adjuster.apply(&row, &adjustment, past), expected, "{adjustment:?}");
            // The last token may come apart from the others.
            if let [generated @ .., last] = generated {
                let past = Past { prompt, generated, last: Some(*last) };
                assert_eq!(adjuster.apply(&row, &adjustment, past), expected);
            }
            // A shorter row after a longer one.
            let short =
                adjusted(&row[..5], &Adjustment { bias: vec![], ..known }, prompt, generated);
            let adjustment = Adjustment { bias: vec![], ..adjustment.clone() };
            let past = Past { prompt, generated, last: None };
            assert_eq!(adjuster.apply(&row[..5], &adjustment, past), short);
        }
    }
}

#[test]
fn adjusted_draws_follow_the_adjusted_logits() {
    let row: Vec<f32> = (0..50).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
    let greedy = Sampling { temperature: 0.0, ..DEFAULT };
    let best = sampler().sample(&row, &greedy, 0);
    let ban = Adjustment { bias: vec![(best, -100.0)], ..Adjustment::default() };
    let second = sampler().sample_adjusted(&row, (&ban, Past::default()), &greedy, 0);
    assert!(second != best && row[second as usize] <= row[best as usize]);
    let force = Adjustment { bias: vec![(11, 100.0)], ..Adjustment::default() };
    let mut sampler = sampler();
    for position in 0..50 {
        let past = Past { prompt: &[1], generated: &[2], last: Some(3) };
        assert_eq!(sampler.sample_adjusted(&row, (&force, past), &DEFAULT, position), 11);
        let moved = adjusted(&row, &ban, &[], &[]);
        let token = sampler.sample_adjusted(&row, (&ban, past), &DEFAULT, position);
        assert_eq!(token, sampler.sample(&moved, &DEFAULT, position));
    }
}

#[test]
fn log_probabilities_are_those_of_the_softmax() {
    let mut row: Vec<f32> = (0..49_151).map(|i| (i as f32 * 0.37).sin() * 9.0 - 4.0).collect();
    row[70] = 20.0;
    row[60] = 20.0;
    row[8] = f32::NEG_INFINITY;
    row[9] = f32::NAN;
    let finite = row.iter().map(|x| f64::from(*x)).filter(|x| x.is_finite());
    let sum: f64 = finite.map(|x| (x - 20.0).exp()).sum();
    let exact = |id: usize| f64::from(row[id]) - 20.0 - sum.ln();
    let sets = SetKind::ALL.into_iter().filter(|set| set.is_supported());
    let told: Vec<Logprobs> =
        sets.map(|set| Sampler::new(set, 0).logprobs(&row, 1234, 20)).collect();
    assert!(told.windows(2).all(|pair| pair[0] == pair[1]), "the same bits everywhere");
    let Logprobs { chosen, top } = &told[0];
    assert!((f64::from(*chosen) - exact(1234)).abs() < 1e-5, "{chosen} {}", exact(1234));
    assert_eq!((top.len(), top[0].0, top[1].0), (20, 60, 70), "of equals the lower id first");
    let mut sorted: Vec<usize> = (0..row.len()).filter(|id| !row[*id].is_nan()).collect();
    sorted.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
    for ((id, logprob), expected) in top.iter().zip(sorted) {
        assert_eq!(*id as usize, expected);
        assert!((f64::from(*logprob) - exact(expected)).abs() < 1e-5);
    }
    let sampler = sampler();
    assert_eq!(sampler.logprobs(&row, 8, 0), Logprobs { chosen: -9999.0, top: vec![] });
    assert_eq!(sampler.logprobs(&row, 9, 0).chosen, -9999.0);
    assert_eq!(sampler.logprobs(&row, 60_000, 0).chosen, -9999.0);
}

#[test]
fn log_probabilities_of_rows_that_nobody_expects() {
    let told = |row: &[f32]| sampler().logprobs(row, 0, 3);
    assert_eq!(told(&[5.0]), Logprobs { chosen: 0.0, top: vec![(0, 0.0)] });
    let none = told(&[f32::NEG_INFINITY; 2]);
    assert_eq!(none, Logprobs { chosen: -9999.0, top: vec![(0, -9999.0), (1, -9999.0)] });
    assert_eq!(told(&[f32::NAN; 2]), Logprobs { chosen: -9999.0, top: vec![] });
    let certain = told(&[1.0, f32::INFINITY]);
    assert_eq!(certain, Logprobs { chosen: -9999.0, top: vec![(1, 0.0), (0, -9999.0)] });
}
