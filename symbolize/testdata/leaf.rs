// Inlined calls, generics, closures and trait objects as a Rust compiler writes them.
use std::collections::BTreeMap;

pub trait Area {
    fn area(&self) -> f64;
}
pub struct Square(pub f64);
pub struct Circle(pub f64);
impl Area for Square {
    fn area(&self) -> f64 {
        squared(self.0)
    }
}
impl Area for Circle {
    fn area(&self) -> f64 {
        squared(self.0) * std::f64::consts::PI
    }
}
#[inline(always)]
fn squared(x: f64) -> f64 {
    x * x
}
#[inline(never)]
pub fn total(shapes: &[Box<dyn Area>]) -> f64 {
    shapes.iter().map(|s| s.area()).filter(|a| *a > 1.5).sum()
}
#[inline(never)]
pub fn count(words: &[String]) -> BTreeMap<&str, usize> {
    let mut map = BTreeMap::new();
    for w in words {
        *map.entry(w.as_str()).or_insert(0) += 1;
    }
    map
}
fn main() {
    let words: Vec<String> = std::env::args().collect();
    let shapes: Vec<Box<dyn Area>> = (0..words.len()).map(|i| -> Box<dyn Area> { if i % 2 == 0 { Box::new(Square(i as f64)) } else { Box::new(Circle(i as f64)) } }).collect();
    println!("{} {:?}", total(&shapes), count(&words));
}
