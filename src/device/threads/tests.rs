//! Teams of every size: all work is done once, barriers order it, panics pass through.

use super::*;

#[test]
fn every_chunk_is_claimed_once_and_barriers_order_the_rounds() {
    for threads in [1, 2, 3, 8] {
        let mut team = Team::new(threads).unwrap();
        assert_eq!(team.threads(), threads);
        let total = 1000;
        let counts: Vec<AtomicUsize> = (0..total).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..20 {
            counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
            team.run(&|member| {
                assert!(member.index() < member.members());
                for round in 0..10 {
                    while let Some(range) = member.claim(total, 7) {
                        for count in &counts[range] {
                            // Everybody is in the same round.
                            assert_eq!(count.fetch_add(1, Ordering::Relaxed), round);
                        }
                    }
                    member.barrier()?;
                }
                Ok(())
            })
            .unwrap();
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 10));
        }
    }
}

#[test]
fn a_job_alone_wakes_nobody() {
    let mut team = Team::new(3).unwrap();
    let ran = AtomicUsize::new(0);
    team.run_alone(&|member| {
        assert_eq!((member.index(), member.members()), (0, 1));
        ran.fetch_add(1, Ordering::Relaxed);
        member.barrier()?;
        member.barrier()
    })
    .unwrap();
    assert_eq!(ran.into_inner(), 1);
}

#[test]
fn a_panic_of_any_member_ends_the_job_and_the_team_lives() {
    let mut team = Team::new(3).unwrap();
    for round in 0..30 {
        let culprit = round % 3;
        let after = AtomicUsize::new(0);
        let error = team
            .run(&|member| {
                member.barrier()?;
                assert!(member.index() != culprit, "member {culprit} fell");
                // Some arrive before the panic, some after.
                if round % 2 == 0 {
                    std::thread::sleep(Duration::from_micros(100));
                }
                member.barrier()?;
                after.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
            .unwrap_err();
        assert_eq!(error.to_string(), format!("member {culprit} fell"));
        assert_eq!(after.into_inner(), 0, "nobody passes a barrier that one never reaches");

        let sum = AtomicUsize::new(0);
        team.run(&|member| {
            while let Some(range) = member.claim(100, 3) {
                sum.fetch_add(range.sum::<usize>(), Ordering::Relaxed);
            }
            member.barrier()
        })
        .unwrap();
        assert_eq!(sum.into_inner(), 4950);
    }
}

#[test]
fn an_idle_team_sleeps() {
    let mut team = Team::new(4).unwrap();
    team.run(&|member| member.barrier()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let before: Vec<Duration> = team.workers.iter().map(processor_time).collect();
    std::thread::sleep(Duration::from_millis(100));
    for (worker, before) in team.workers.iter().zip(before) {
        let used = processor_time(worker) - before;
        assert!(used < Duration::from_millis(1), "an idle worker used {used:?}");
    }
}

fn processor_time(worker: &JoinHandle<()>) -> Duration {
    use std::os::unix::thread::JoinHandleExt;
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the thread is not joined yet, and both results are valid for writing.
    unsafe {
        assert_eq!(libc::pthread_getcpuclockid(worker.as_pthread_t(), &mut clock), 0);
        assert_eq!(libc::clock_gettime(clock, &mut time), 0);
    }
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
