// Surfaces that turn together: drag, or use the arrow keys. Nothing is fetched.
(() => {
  const script = document.currentScript;
  const { surfaces, colors, ticks, label } = JSON.parse(
    script.parentNode.querySelector("script[type='application/json']").textContent
  );
  const canvases = [...script.parentNode.querySelectorAll("canvas")];
  const HEIGHT = 1.3;
  let yaw = -0.8;
  let pitch = 0.7;

  // x and y are in [-1, 1], z in [0, 1]. The third value is the distance.
  const projection = (canvas) => {
    const [sin, cos] = [Math.sin(yaw), Math.cos(yaw)];
    const [up, along] = [Math.cos(pitch), Math.sin(pitch)];
    // Corners of the floor are 1.42 from its middle.
    const half = 1.42 * along + (HEIGHT / 2) * up;
    const scale = 0.45 * Math.min(canvas.width / 1.9, canvas.height / half);
    return (x, y, z) => {
      const right = x * cos - y * sin;
      const depth = x * sin + y * cos;
      const height = (z - 0.5) * HEIGHT;
      return [
        canvas.width / 2 + scale * right,
        canvas.height / 2 - scale * (depth * along + height * up),
        depth * up - height * along,
      ];
    };
  };

  const drawFrame = (context, project, ink, size) => {
    context.strokeStyle = ink;
    context.fillStyle = ink;
    context.globalAlpha = 0.5;
    context.lineWidth = 1;
    const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]];
    context.beginPath();
    corners.forEach(([x, y], i) => {
      const [a, b] = project(x, y, 0);
      i ? context.lineTo(a, b) : context.moveTo(a, b);
    });
    context.closePath();
    context.stroke();
    // The scale stands at the leftmost corner.
    const at = corners.reduce((best, corner) =>
      project(...corner, 0)[0] < project(...best, 0)[0] ? corner : best
    );
    const [bottom, top] = [project(...at, 0), project(...at, 1)];
    context.beginPath();
    context.moveTo(bottom[0], bottom[1]);
    context.lineTo(top[0], top[1]);
    context.stroke();
    context.globalAlpha = 1;
    context.font = `${size}px system-ui, sans-serif`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const [z, text] of ticks) {
      const [a, b] = project(...at, z);
      context.fillText(text, a - size / 2, b);
    }
    context.textAlign = "left";
    context.fillText(label, size / 2, size);
    context.textAlign = "center";
    for (const [text, x, y] of [["1st direction", 0, -1.5], ["2nd direction", 1.5, 0]]) {
      const [a, b] = project(x, y, 0);
      context.fillText(text, a, b);
    }
  };

  const drawSurface = (context, project, { heights, x, y }) => {
    const points = heights.map((row, i) => row.map((z, j) => project(x[i], y[j], z)));
    const tiles = [];
    for (let i = 0; i + 1 < x.length; i++) {
      for (let j = 0; j + 1 < y.length; j++) {
        const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]];
        const mean = (value) => corners.reduce((sum, c) => sum + value(c), 0) / 4;
        tiles.push({
          corners: corners.map(([k, l]) => points[k][l]),
          height: mean(([k, l]) => heights[k][l]),
          distance: mean(([k, l]) => points[k][l][2]),
        });
      }
    }
    tiles.sort((a, b) => b.distance - a.distance);
    for (const { corners, height } of tiles) {
      const color = colors[Math.round(height * (colors.length - 1))];
      context.beginPath();
      corners.forEach(([a, b], i) => (i ? context.lineTo(a, b) : context.moveTo(a, b)));
      context.closePath();
      context.fillStyle = color;
      // A rim of its own colour closes the gaps between tiles.
      context.strokeStyle = color;
      context.fill();
      context.stroke();
    }
  };

  const draw = () => {
    canvases.forEach((canvas, i) => {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.round(canvas.clientWidth * ratio);
      canvas.height = Math.round(canvas.clientHeight * ratio);
      const context = canvas.getContext("2d");
      const project = projection(canvas);
      drawFrame(context, project, getComputedStyle(canvas).color, 13 * ratio);
      drawSurface(context, project, surfaces[i]);
    });
  };

  const turn = (right, up) => {
    yaw += right;
    pitch = Math.min(Math.max(pitch + up, 0), Math.PI / 2);
    draw();
  };
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  for (const canvas of canvases) {
    canvas.addEventListener("pointerdown", (e) => canvas.setPointerCapture(e.pointerId));
    canvas.addEventListener("pointermove", (e) => {
      if (e.buttons) turn(0.01 * e.movementX, 0.01 * e.movementY);
    });
    canvas.addEventListener("keydown", (e) => {
      if (!(e.key in steps)) return;
      e.preventDefault();
      turn(...steps[e.key].map((step) => 0.1 * step));
    });
  }
  window.addEventListener("resize", draw);
  draw();
})();
