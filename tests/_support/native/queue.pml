/* How blocks share out work in csrc/cuda/kernels.cuh, for spin: every interleaving of a few blocks over a few tiles.
 *
 *   spin -DFORM=2 -DBLOCKS=2 -DRESIDENT=2 -DTILES=4 -DPER_COMPONENT=2 -a queue.pml
 *   gcc -O2 -w -DSAFETY -o pan pan.c && ./pan -m200000 -w24
 *   gcc -O2 -w -DNP -o pan pan.c && ./pan -m200000 -w24 -l
 *
 * FORM            1: Mode::sum, then Mode::scale; 2: Mode::both
 * BLOCKS          in each launch
 * RESIDENT        blocks that run at a time; the others begin when one has ended, and none is ever interrupted for good
 * TILES           in all; PER_COMPONENT consecutive ones are a component. A component of one tile is measured, judged and
 *                 scaled at once, and shares nothing
 * MANY            components of more tiles than this are added up by the workers; not given: none
 * BREAK           breaks one rule, to see that the model notices (tests/test_queue_model.py); 0 or not given: none
 *
 * Which components are clipped is any choice. A block is a scheduler and a worker, for all of its workers: the
 * next job is there when this one is done, and the job before has been handed in by then. What a
 * GPU does one at a time, one atomic or one access to shared memory, is one step here. spin's memory is sequentially
 * consistent; that each release and acquire is where it is needed, ThreadSanitizer judges (hand_over.cpp).
 *
 * -DSAFETY: no block is left waiting (an invalid end state), and the assertions hold: a tile is measured once; a component
 * is added up when all of its tiles have been handed in; what is clipped is scaled once, after its coefficient was
 * written, and nothing else; everything in the workspace is zero at the end. -DNP: nothing goes on forever.
 */
#ifndef BREAK
#define BREAK 0
#endif
#ifndef MANY
#define MANY 255
#endif
#define COMPONENTS ((TILES + PER_COMPONENT - 1) / PER_COMPONENT)
#define LAUNCHES (3 - FORM)
#define LAST_SIZE (TILES - (COMPONENTS - 1) * PER_COMPONENT)
#define SPLIT ((COMPONENTS - 1) * (PER_COMPONENT > 1) + (LAST_SIZE > 1)) /* components of several tiles */
#define size_of(a_tile) ((a_tile) / PER_COMPONENT == COMPONENTS - 1 -> LAST_SIZE : PER_COMPONENT)

mtype = { sum, add, whole, scale, none, leave_ };

/* The workspace. A place in the list holds 1 + tile, 0 if nothing. */
byte sum_ticket, scale_ticket, listed, finished, left;
byte done[COMPONENTS];
byte list[TILES];
bool partial[TILES];

bool clipped[COMPONENTS];   /* what the norms will say */
bool coef[COMPONENTS];      /* whether it has been written */
byte measured[TILES], scaled[TILES];

byte running, ended;        /* blocks, of this launch */
byte launch;                /* the one that blocks may begin in */
#if BREAK == 11
byte begun;
#endif

chan job_of[BLOCKS * LAUNCHES] = [0] of { mtype, byte };
chan barrier[BLOCKS * LAUNCHES] = [0] of { bit };

#define measures (FORM == 2 || number < BLOCKS)
#define scales (FORM == 2 || number >= BLOCKS)
#define NONE 255
/* Whether the list has something for this block. */
#define sees_listed (my_place == NONE -> listed > scale_ticket : my_place < TILES && list[my_place] != 0)

/* An atomic or d_step below has one access to what blocks share; the rest of it is the block's own. */

/* By a warp, whose lanes write in any order: forwards or backwards, which for two tiles is any. */
inline list_component() {
  atomic {
    place = listed; listed = listed + count; i = 0;
    if :: backwards = false :: count > 1 -> backwards = true fi
  }
  do
  :: d_step { i < count -> lane = (backwards -> count - 1 - i : i); list[place + lane] = 1 + first + lane; i++ }
  :: else -> break
  od
}

inline finish_component() {
  d_step { /* partial sums don't change any more */
    i = 0;
    do
    :: i < count -> assert(partial[first + i]); i++
    :: else -> break
    od
  }
#if BREAK == 2 /* counted before its tiles are listed */
  if :: FORM == 2 -> finished++ :: else fi;
#endif
#if BREAK == 3 /* listed before its coefficient is written */
  if :: clipped[c] -> list_component() :: else fi;
  coef[c] = true;
#else
  coef[c] = true;
  if :: clipped[c] -> list_component() :: else fi;
#endif
#if BREAK != 2
  if :: FORM == 2 -> finished++ :: else fi
#else
  skip
#endif
}

/* Of a tile, or of a component whose sums the workers have added up. */
inline hand_in(what, a_tile) {
  d_step {
    c = a_tile / PER_COMPONENT; first = c * PER_COMPONENT;
    count = size_of(a_tile)
  }
  if
  :: what == add -> finish_component()
  :: else ->
#if BREAK != 9 /* counts the tile before its sum is written */
    partial[a_tile] = true;
#endif
    d_step { place = done[c]; done[c]++ }
#if BREAK == 4 /* whoever is first adds up */
    if :: place == 0 ->
#else
    if :: place == count - 1 ->
#endif
#if BREAK != 1 /* done counters stay as they are */
      done[c] = 0;
#endif
      if
      :: count > MANY -> to_add = first
      :: else -> finish_component()
      fi
    :: else ->
#if BREAK == 14 /* forgets a component that it was to add up */
      to_add = NONE
#endif
    fi;
#if BREAK == 9
    partial[a_tile] = true;
#endif
  fi;
  d_step { c = 0; first = 0; count = 0; place = 0; i = 0; lane = 0; backwards = false } /* fewer states */
}

/* Takes the next tile to measure into `ahead`, and draws the ticket after it; or, of form 1's second launch, the next one of
   this block's places from the list's end. */
inline look_ahead() {
  if
  :: measures && ahead == NONE && my_tile < TILES ->
    d_step { ahead = my_tile; my_tile = sum_ticket + (FORM == 1 || BREAK == 13 -> BLOCKS : 0); sum_ticket++ }
  :: FORM == 1 && scales && ahead == NONE && my_place < known_listed ->
    d_step {
      place = known_listed - 1 - my_place; ahead = list[place] - 1; list[place] = 0;
      my_place = my_place + BLOCKS; place = 0
    }
  :: else
  fi;
}

/* A listed tile into `entry`, plus 1; or 0. Form 2. */
inline take_listed() {
  if
  :: my_place == NONE ->
    place = listed;
    if
    :: place > scale_ticket -> d_step { my_place = scale_ticket; scale_ticket++ } /* two steps there: others may draw it */
    :: else
    fi;
    place = 0
  :: else
  fi;
  if
  :: my_place < TILES -> entry = list[my_place]
  :: else -> entry = 0
  fi;
  if
  :: entry != 0 -> list[my_place] = 0; my_place = NONE
#if BREAK == 6 /* gives its place up if it finds nothing there */
  :: else -> my_place = NONE
#else
  :: else
#endif
  fi
}

/* Into work and tile. known: whether all components of several tiles were finished. */
inline next(in_hand) {
  d_step { work = none; tile = 0; known = 0 }
  do
  ::
#if BREAK != 14
    if :: to_add != NONE -> d_step { work = add; tile = to_add; to_add = NONE } break :: else fi;
#endif
    if
    :: FORM == 2 ->
      take_listed();
      if :: entry != 0 -> d_step { work = scale; tile = entry - 1; entry = 0; known = 0 } break :: else fi
    :: else
    fi;
#if BREAK == 14 /* looks at the list first */
    if :: to_add != NONE -> d_step { work = add; tile = to_add; to_add = NONE } break :: else fi;
#endif
    if
    :: ahead != NONE ->
      d_step {
        tile = ahead; ahead = NONE; known = 0;
        work = (measures -> (size_of(tile) == 1 -> whole : sum) : scale)
      }
      break
    :: else
    fi;
#if BREAK != 7 /* waits although it has a sum to hand in */
    if :: in_hand -> known = 0; break :: else fi;
#endif
    if
    :: FORM == 1 || known -> work = leave_; known = 0; break
    :: else
    fi;
    known = (finished == SPLIT);
#if BREAK == 5 /* leaves without one more look at the list */
    if :: known -> work = leave_; known = 0; break :: else fi;
#endif
#if BREAK != 12 /* looks again and again */
    /* Looks again when there is something new to see, which stays there until then, or another block has taken it: looking
       before is a longer way to the same. So no fairness is asked of the scheduler, and whoever could look forever is at
       an invalid end. */
    (finished == SPLIT || sees_listed)
#endif
  od
}

inline leave() {
#if BREAK != 8 /* nobody sets the counters back */
  if
  :: scales ->
    d_step { place = left; left++ }
#if BREAK == 10 /* the first to leave does it, not the last */
    if :: place == 0 ->
#else
    if :: place == BLOCKS - 1 ->
#endif
      scale_ticket = 0; listed = 0; finished = 0; left = 0; sum_ticket = 0
    :: else
    fi
  :: else
  fi;
#endif
  skip
}

/* Block `number`, counted through both launches: what its scheduler warp does. */
proctype Block(byte number) {
  byte my_tile, my_place = NONE, known_listed; /* tickets drawn, and how long the list was at the beginning */
  byte ahead = NONE, to_add = NONE;            /* the tile that comes next, if it is known; a component, by its first */
  byte tile, now, before;                      /* of the jobs: the next one, the one that the worker has, the one before */
  mtype work = none, current = none, previous = none;
  byte entry, known, place, c, first, count, i, lane;
  bool backwards;

  atomic { launch == number / BLOCKS && running < RESIDENT -> running++ }
#if BREAK == 11 /* waits until all blocks have begun */
  d_step { begun++ }
  begun == BLOCKS * (1 + number / BLOCKS);
#endif
  if
#if BREAK == 13 /* its first ticket is its number, although others wait for what it takes */
  :: FORM == 2 -> my_tile = number
#else
  :: FORM == 2 -> d_step { my_tile = sum_ticket; sum_ticket++ }
#endif
  :: FORM == 1 && measures -> my_tile = number
  :: FORM == 1 && scales -> d_step { my_place = number - BLOCKS; known_listed = listed }
  fi;
  look_ahead();
  do
  :: next(current == sum || current == add);
    atomic { barrier[number] ? 0 -> previous = current; before = now; current = work; now = tile }
    if :: current == leave_ -> break :: else fi;
    job_of[number] ! current, now;
    look_ahead();
    if :: previous == sum || previous == add -> hand_in(previous, before) :: else fi
  od;
  leave();
  atomic {
    running--; ended++;
    if
    :: ended == BLOCKS -> ended = 0; launch++
    :: else
    fi
  }
}

/* Its worker warps. What they scale by is needed at once. */
proctype Worker(byte number) {
  byte tile;
  barrier[number] ! 0;
end:
  do
  :: job_of[number] ? sum, tile -> measured[tile]++; barrier[number] ! 0
  :: job_of[number] ? add, tile -> barrier[number] ! 0
  :: atomic { job_of[number] ? whole, tile ->
      measured[tile]++; coef[tile / PER_COMPONENT] = true;
      if :: clipped[tile / PER_COMPONENT] -> scaled[tile]++ :: else fi }
    barrier[number] ! 0
  :: atomic { job_of[number] ? scale, tile ->
      assert(coef[tile / PER_COMPONENT] && clipped[tile / PER_COMPONENT] && measured[tile] == 1);
      scaled[tile]++ }
    barrier[number] ! 0
  :: job_of[number] ? none, tile -> barrier[number] ! 0
  od
}

init {
  byte n;
  atomic {
    n = 0;
    do
    :: n < COMPONENTS -> if :: clipped[n] = true :: clipped[n] = false fi; n++
    :: else -> break
    od;
    n = 0;
    do
    :: n < BLOCKS * LAUNCHES -> run Block(n); run Worker(n); n++
    :: else -> break
    od
  }
  launch == LAUNCHES;
  atomic {
    n = 0;
    do
    :: n < TILES ->
      assert(measured[n] == 1 && list[n] == 0);
      assert(scaled[n] == (clipped[n / PER_COMPONENT] -> 1 : 0));
      n++
    :: else -> break
    od;
    n = 0;
    do
    :: n < COMPONENTS -> assert(done[n] == 0 && coef[n]); n++
    :: else -> break
    od;
    assert(sum_ticket == 0 && scale_ticket == 0 && listed == 0 && finished == 0 && left == 0)
  }
}
