// An image, a map over it and, under the pointer, all places that share one key/value token.
const POINT = "sgformer-point"; // viewers side by side light up the same place

export default {
  props: { result: String, kind: String, block: String, opacity: Number },
  data: () => ({ grid: null, at: null, shape: 1 }),
  template: `
    <div class="sg-viewer">
      <div class="sg-picture" :style="{ aspectRatio: shape, '--shape': shape }" tabindex="0" role="img" aria-label="The image with a map over it; arrow keys move the place"
           @pointermove="move" @pointerdown="move" @pointerleave="tell(null)" @keydown="step">
        <img v-if="result" class="sg-image" :src="base + '/image.png'" alt="" draggable="false"
             @load="shape = $event.target.naturalWidth / $event.target.naturalHeight">
        <img v-if="result" class="sg-layer" :src="base + '/' + kind + '/' + block + '.png'" alt=""
             :style="{ opacity: at && grid ? 0 : opacity }" draggable="false">
        <canvas v-show="at && grid" class="sg-layer" ref="canvas"></canvas>
        <i v-if="at && grid" class="sg-ring" :style="ring"></i>
      </div>
      <p class="sg-told" v-html="told"></p>
    </div>`,
  computed: {
    base() { return "/results/" + this.result; },
    cell() {
      if (!this.at || !this.grid) return null;
      const [row, column] = [Math.floor(this.at.y * this.grid.height), Math.floor(this.at.x * this.grid.width)];
      return { row, column, index: row * this.grid.width + column };
    },
    ring() {
      const part = (n, of) => (100 * n) / of + "%";
      const { width, height } = this.grid;
      return { left: part(this.cell.column, width), top: part(this.cell.row, height), width: part(1, width), height: part(1, height) };
    },
    told() {
      if (!this.result) return "";
      if (!this.grid) return "Nothing is reallocated here: every place is a key/value token of its own.";
      if (!this.cell) return `${matchMedia("(hover: none)").matches ? "Touch" : "Hover"} the image: which places share one key/value token?`;
      const { tokens, regions, names, colours, count } = this.grid;
      const token = tokens[this.cell.index], region = regions[this.cell.index];
      const shared = tokens.filter((t) => t === token).length;
      const dot = `<i class="sg-dot" style="background:rgb(${colours[region]})"></i>`;
      const places = shared === 1 ? "a place of its own" : `<b>${shared} places</b> that became one`;
      return `${dot}key/value token <b>${token + 1}</b> of ${count}, ${names[region] || "middle"} region: ${places}`;
    },
  },
  watch: {
    cell: "paint",
    result: "fetchGrid",
    block: "fetchGrid",
  },
  mounted() {
    this.hear = (event) => (this.at = event.detail);
    window.addEventListener(POINT, this.hear);
    this.fetchGrid();
  },
  unmounted() { window.removeEventListener(POINT, this.hear); },
  methods: {
    async fetchGrid() {
      if (!this.result) return;
      const url = `${this.base}/tokens/${this.block}`;
      const answer = await fetch(url);
      const grid = answer.ok ? await answer.json() : null;
      if (url !== `${this.base}/tokens/${this.block}`) return; // another one was asked for meanwhile
      this.grid = grid;
      this.paint();
    },
    tell(at) { window.dispatchEvent(new CustomEvent(POINT, { detail: at })); },
    move(event) {
      const box = event.currentTarget.getBoundingClientRect();
      const inside = (value) => Math.min(Math.max(value, 0), 0.9999);
      this.tell({ x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) });
    },
    step(event) {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") this.tell(null);
      if (!way || !this.grid) return;
      event.preventDefault();
      const { width, height } = this.grid;
      const from = this.cell || { row: height >> 1, column: width >> 1 };
      const inside = (value, size) => (Math.min(Math.max(value, 0), size - 1) + 0.5) / size;
      this.tell({ x: inside(from.column + way[1], width), y: inside(from.row + way[0], height) });
    },
    paint() {
      if (!this.cell) return;
      const { width, height, tokens, regions, colours } = this.grid, canvas = this.$refs.canvas;
      [canvas.width, canvas.height] = [width, height];
      const pixels = new ImageData(width, height), token = tokens[this.cell.index];
      tokens.forEach((other, i) => pixels.data.set(other === token ? [...colours[regions[i]], 100] : [247, 248, 250, 180], 4 * i));
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    },
  },
};
