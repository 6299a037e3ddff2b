//! Training without Python: fits a line of 10,000 weights with 8-bit Adam, in safe Rust.
//!
//! `cargo run --release -p qadam-core --example regression`

use qadam_core::{Adam, Hyper, Result, StateFormat, Update};

fn main() -> Result<()> {
    let target: Vec<f32> = (0..10_000_u16).map(|i| (f32::from(i) * 0.01).sin()).collect();
    let mut weights = vec![0.0_f32; target.len()];
    let mut adam = Adam::new(Hyper { lr: 0.01, ..Hyper::adam() }, StateFormat::DYNAMIC8)?;
    let id = adam.add(weights.len());
    for step in 0..=400 {
        // the gradient of half the squared distance to the target
        let gradient: Vec<f32> = weights.iter().zip(&target).map(|(w, t)| w - t).collect();
        if step % 100 == 0 {
            let loss: f32 = gradient.iter().map(|g| g * g / 2.0).sum();
            println!("step {step:3}: loss {loss:.6}");
        }
        adam.step(&mut [Update::new(id, &mut weights[..], &gradient[..])])?;
    }
    Ok(())
}
