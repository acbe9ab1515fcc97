"`grid` against the rules in their plainest form, to the bit, and its hard cases one by one. The lessons are in the notebook data.timeseries."
import numpy as np, pandas as pd, pytest
from fastcore.test import test_close, test_eq, test_fail

from mmsn.data.cohort import Cohort
from mmsn.data.timeseries import Channel, _classify, _source, add_series, category_codes, grid, hour_bins, layout, n_bins
from mmsn.data.writer import CohortWriter, close_with_summary, fit_normaliser

for helper in (test_close, test_eq, test_fail): helper.__test__ = False   # fastcore's assertions are no tests of ours

HEART = Channel('Heart Rate', unit='bpm', normal=86, low=0, high=350)
RHYTHM = Channel('Rhythm', normal='sinus', categories=('sinus', 'paced'))
FOUR = [HEART, RHYTHM, Channel('SpO2', '%', 98, 0, 100), Channel('GCS', '', '15', categories=('3', '8', '15'))]


def slow_grid(events, lengths, channels, timestep=1., impute='previous', ties='greatest', drop_outside=True, grace=0.):
    "The rules, one event and one hour after the other."
    blocks = []
    for s, length in enumerate(lengths):
        n = int(length/timestep + 1 - 1e-6)
        cells = {}
        own = [(t, c, v) for stay, t, c, v in events if stay == s and not np.isnan(v)]      # NaN has no place in an order
        for t, c, v in sorted(own, key=lambda e: (e[0], e[2]) if ties == 'greatest' else e[0]):     # sorted is stable: 'last' keeps the order given
            ch = channels[c]
            if t < -grace or t > length + 1e-6 or not n: continue
            if ch.categories and v not in range(len(ch.categories)): continue
            if not ch.categories and drop_outside and not (ch.low <= v <= ch.high): continue
            cells[max(min(int(t/timestep - 1e-6), n - 1), 0), c] = v                                          # a later one overwrites
        block = []
        for hour in range(n):
            values = []
            for c, ch in enumerate(channels):
                back, ahead = range(hour, -1, -1), range(hour, n)
                look = dict(previous=back, next=ahead).get(impute, [hour])
                v = next((cells[h, c] for h in look if (h, c) in cells), None)
                if v is None: values += [0.]*ch.width if impute == 'zero' else ch.row.tolist()
                else: values += [float(v == k) for k in range(ch.width)] if ch.categories else [v]
            block.append(values + [float((hour, c) in cells) for c in range(len(channels))])
        blocks += block
    return np.array(blocks, np.float32)


@pytest.fixture(scope='module')
def hard():
    "Ten thousand events with everything that goes wrong in hospital data, and the lengths of 63 stays, one of no length and one without events."
    rng, n = np.random.default_rng(1), 10_000
    lengths = np.concatenate([rng.uniform(0, 30, 60), [0, 5, 48]])
    events = (rng.integers(0, 62, n), np.round(rng.uniform(-1, 32, n), 1), rng.integers(0, 4, n))     # times of six minutes: many ties
    value = np.choose(events[2], [rng.normal(90, 15, n).round(), rng.integers(-1, 3, n), rng.uniform(80, 105, n).round(), rng.integers(0, 4, n)]).astype(float)
    value[rng.random(n) < .02] = np.nan
    return (*events, value), lengths


@pytest.mark.parametrize('options', [dict(impute=i) for i in ('previous', 'next', 'normal_value', 'zero')] + [
    dict(ties='last'), dict(timestep=2.), dict(timestep=.5, grace=.5), dict(drop_outside=False)], ids=str)
def test_slow_loop(hard, options):
    events, lengths = hard
    fast, slow = grid(*events, lengths, FOUR, **options), slow_grid(list(zip(*events)), lengths, FOUR, **options)
    assert np.array_equal(fast.values, slow), np.argwhere(fast.values != slow)[:5]
    test_eq(fast.counts.events.to_numpy(), fast.counts.drop(columns='events').sum(axis=1).to_numpy())        # every event has exactly one outcome
    test_eq(fast.counts.events.sum(), 10_000)


def test_order_and_masks(hard):
    events, lengths = hard
    g = grid(*events, lengths, FOUR)
    shuffled = np.random.default_rng(2).permutation(10_000)
    test_eq(grid(*(x[shuffled] for x in events), lengths, FOUR).values, g.values)           # the order of the file does not matter
    test_eq(g.lengths[[60, 62]].tolist(), [0, 48])
    test_eq(g.values[:, 1:3].sum(1), np.ones(len(g.values))); test_eq(g.values[:, 4:7].sum(1), np.ones(len(g.values)))
    test_eq(g.values[:, -4:].sum(0).astype(int), g.counts.cells.to_numpy())
    empty = grid([], [], [], [], [3], FOUR)
    test_eq(empty.values, np.tile(np.concatenate([c.row for c in FOUR] + [np.zeros(4)]), (3, 1)))    # nothing known: the normal row


def test_hard_cases():
    one = lambda hours, values, **kw: grid([0]*len(hours), hours, [0]*len(hours), values, [2], [HEART], **kw).values[:, 0].tolist()
    test_eq(one([.5, .5], [108, 87]), [108, 108])                         # as numbers; as text '87' would beat '108'
    test_eq(one([.5, .5], [108, 87], ties='last'), [87, 87])
    test_eq(one([.9, .5], [80, 120]), [80, 80])                           # the latest, not the last in the file
    test_eq(one([1, 2], [70, 75]), [70, 75])                              # right-closed, and the very end counts
    test_eq(one([-40/3600], [70]), [86, 86])                              # charted in the minute of admission, 40 s before it
    test_eq(one([-40/3600], [70], grace=60/3600), [70, 70])
    test_eq(one([.5], [9_999_999]), [86, 86])
    test_eq(one([.5], [9_999_999], drop_outside=False), [9_999_999]*2)
    test_fail(lambda: grid([5], [0], [0], [1], [3], FOUR), contains='name stay 5, but there are only 1')
    test_fail(lambda: grid([0], [0], [9], [1], [3], FOUR), contains='name channel 9')
    test_fail(lambda: grid([0], [0], [0], [1], [3], FOUR, impute='mean'), contains='impute should be one of')


def test_small_use():
    events = pd.DataFrame([(0, 2.2, 0, 95), (0, 0.5, 0, 80), (0, 0.9, 0, 82), (0, 1.5, 1, 1), (1, 2.4, 0, 70), (1, 99, 0, 71)],
                          columns=['stay', 'hours', 'channel', 'value'])
    g = grid(events.stay, events.hours, events.channel, events.value, lengths=[4, 2.5], channels=[HEART, RHYTHM])
    test_eq(g.lengths.tolist(), [4, 3])
    test_eq(g.values[:, 0].tolist(), [82, 82, 95, 95,   86, 86, 70])     # last of the hour, carried on; the normal value before the first
    test_eq(g.values[:, 2].tolist(), [0, 1, 1, 1,   0, 0, 0])            # paced, from hour 1 on
    test_eq(g.values[:, 3].tolist(), [1, 0, 1, 0,   0, 0, 1])            # where the heart rate was looked at
    test_eq(g.counts.loc['Heart Rate', ['late', 'replaced', 'cells']].tolist(), [1, 1, 3])


def test_channels():
    table, columns = layout([HEART, RHYTHM])
    test_eq(columns, ['Heart Rate', 'Rhythm=sinus', 'Rhythm=paced', 'Heart Rate observed', 'Rhythm observed'])
    test_eq([(c['columns'], c['mask']) for c in table], [([0, 1], 3), ([1, 3], 4)])
    test_eq((HEART.row.tolist(), RHYTHM.row.tolist()), ([86], [1, 0]))
    test_fail(lambda: Channel('Rhythm', normal='flutter', categories=('sinus', 'paced')), contains='not among its categories')
    test_fail(lambda: Channel('pH', normal='7.4'), contains='should be a number')
    test_fail(lambda: layout([HEART, HEART]), contains='one name')
    test_eq(category_codes(['paced', 'sinus', 'paced'], RHYTHM).tolist(), [1, 0, 1])
    assert np.isnan(category_codes(['Paced', '', None], RHYTHM)).all()


def test_binning_rules():
    seconds = np.arange(48*3600 + 1)
    for step in (0.5, 1.0, 2.0):
        test_eq(hour_bins(seconds/3600, step), hour_bins(seconds/3600, step, 'seconds'))
        test_eq(n_bins(seconds/3600, step), n_bins(seconds/3600, step, 'seconds'))
    test_eq(hour_bins([0, 1, 1 + 1/3600, 47.999, 48]).tolist(), [0, 0, 1, 47, 47])            # right-closed
    test_eq(n_bins([0, 1, 1.01, 48]).tolist(), [0, 1, 2, 48])
    test_eq(hour_bins([-.01]).tolist(), [0])                                                 # cut towards zero
    test_eq((hour_bins([3600.4/3600])[0], hour_bins([3600.4/3600], rule='seconds')[0]), (1, 0))
    test_eq((hour_bins(seconds/3600) < n_bins([48])).all(), True)                            # the last event always has a bin
    test_fail(lambda: hour_bins([1], rule='left'), contains="'hours' or 'seconds'")


def test_outcomes():
    outcome = _classify(np.array([-.1, -.01, 5, 1, 1, 1, np.nan]), np.array([80, 80, 80, np.nan, 400, 80, 80.]), np.full(7, 4.), HEART, True, grace=1/60)
    test_eq(outcome.tolist(), [1, 0, 2, 3, 4, 0, 1])
    test_eq(_classify(np.ones(4), np.array([0, 1, 2, .5]), np.full(4, 4.), RHYTHM, False, 0).tolist(), [0, 0, 3, 3])    # no third category, no half one


def test_sources():
    observed, first, last = np.array([0, 1, 0, 0, 1, 0], bool), np.array([0, 0, 0, 3, 3, 3]), np.array([2, 2, 2, 5, 5, 5])    # two stays of three hours
    test_eq(_source(observed, first, last, 'previous').tolist(), [-1, 1, 1, -1, 4, 4])     # nothing leaks from the first stay into the second
    test_eq(_source(observed, first, last, 'next').tolist(), [1, 1, -1, 4, 4, -1])
    test_eq(_source(observed, first, last, 'zero').tolist(), [-1, 1, -1, -1, 4, -1])


def test_normaliser_sees_observed_cells():
    rng = np.random.default_rng(4)
    t = np.sort(rng.uniform(6, 48, 22)); hr = 85 + 25*np.sin(t/7) + rng.normal(0, 4, 22)
    g = grid(np.zeros(25, int), np.concatenate([t, [3., 20, 33]]), np.repeat([0, 1], [22, 3]), np.concatenate([hr, [0, 1, 0]]), [48], [HEART, RHYTHM])
    observed = g.values[:, 3] > 0
    test_eq(g.values[:5, 0], np.full(5, 86)); test_eq(int(observed.sum()), len(set(hour_bins(t))))
    mean, std = fit_normaliser(g.values, [0], g.lengths, layout([HEART, RHYTHM])[0])
    test_close((mean[0], std[0]), (g.values[observed, 0].astype(float).mean(), g.values[observed, 0].astype(float).std()), eps=1e-6)


def test_million_events():
    rng, n = np.random.default_rng(0), 1_000_000
    many = rng.integers(0, 10_000, n), rng.uniform(0, 48, n), rng.integers(0, 17, n), rng.normal(0, 1, n)
    g = grid(*many, np.full(10_000, 48.), [Channel(f'c{i}', normal=1., low=-5, high=5) for i in range(17)])
    test_eq((g.values.shape, int(g.counts.events.sum())), ((480_000, 34), n))


def test_add_series(tmp_path):
    channels = [Channel('pulse', 'bpm', 86., 1., 299.), Channel('lactate', 'mmol/L', 1.5, .1, 40.)]
    events = pd.DataFrame([(0, .5, 0, 80), (0, 2.2, 0, 95), (0, 2.9, 1, 4.1), (1, .1, 0, 9999)], columns=['stay', 'hours', 'channel', 'value'])
    with CohortWriter(tmp_path/'tiny', 'tiny') as w:
        first, rows, counts = add_series(w, 'ehr', channels, events, [3, 2])
        samples = pd.DataFrame(dict(sample_id=[1, 2], subject_id=[1, 2], split=['train', 'val'], ehr_start=first, ehr_length=rows))
        close_with_summary(w, samples, [], counts)
    tiny = Cohort.open(tmp_path/'tiny')
    test_eq(rows, [3, 0])                                   # 9999 bpm is all that stay 1 has: it lacks the modality
    test_close(tiny[0]['ehr'], [[80, 1.5, 1, 0], [80, 1.5, 0, 0], [95, 4.1, 1, 1]])
    test_eq(tiny[1]['ehr'], None)
