// Samples of the server's counters, and the rates between them.

const KEPT = 300; // samples, one a second

export class History {
  constructor() {
    this.points = [];
    this.last = null;
  }

  /** Take a sample of /v1/stats at `time` in seconds; null where the server did not answer. */
  add(time, stats) {
    if (stats === null) {
      this.last = null;
      this.points.push({ time });
    } else {
      const { engine, recent } = stats;
      this.points.push({
        time,
        ...this.rates(time, engine),
        firstMedian: recent.time_to_first_token.p50,
        firstWorst: recent.time_to_first_token.p99,
        wholeMedian: recent.seconds.p50,
        wholeWorst: recent.seconds.p99,
        running: engine.running,
        waiting: engine.waiting,
      });
      this.last = { time, engine };
    }
    if (this.points.length > KEPT) this.points.shift();
  }

  rates(time, engine) {
    const before = this.last;
    if (before === null || time <= before.time) return {};
    const rate = (field) => {
      const gained = engine[field] - before.engine[field];
      return Number.isFinite(gained) && gained >= 0 ? gained / (time - before.time) : undefined; // a restart counts anew
    };
    return { generated: rate("generated_tokens"), computed: rate("computed_tokens"), padded: rate("padded_tokens") };
  }

  get now() {
    return this.points.at(-1) ?? {};
  }
}
